"""What to train: the keys of a config, and one clear sentence for each that is wrong."""

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import shtab
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lockstep.errors import UsageError
from lockstep.nearest import did_you_mean
from lockstep.strategy import DDPOptions

Precision = Literal["auto", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"]

OWNED = {
    "strategy": "set strategy (ddp) and its options (ddp.*) at the top level",
    "devices": "the launcher decides it (launch/local.py --ranks)",
    "num_nodes": "the launcher decides it (launch/local.py --nodes)",
    "use_distributed_sampler": "the order and sharding of the data are lockstep's",
    "default_root_dir": "everything goes into the run folder; set run.root",
    "barebones": "it would train without logs and checkpoints",
}
"""Arguments of lightning's Trainer that are not for a config, and what to do instead."""


@dataclass
class RunOptions:
    """The run and its folder, <root>/<name>/<id>.

    Args:
        name: What the run is called.
        root: Folder of all runs.
        test: Test the final weights when training has ended, where there is a test set.
    """

    name: str = "run"
    root: Path = Path("runs")
    test: bool = True


@dataclass
class CheckpointOptions:
    """What is kept below <run folder>/checkpoints: the newest after every validation, and the best.

    Args:
        monitor: Metric that says which are the best, such as val/accuracy; none keeps the newest alone.
        mode: Whether more or less of it is better.
        best: How many of the best are kept.
    """

    monitor: str | None = None
    mode: Literal["max", "min"] = "max"
    best: int = 1


@dataclass
class WandbOptions:
    """Where W&B keeps the run; its id is the run's.

    Args:
        mode: ``auto`` is ``online`` where an API key is configured, else ``offline``; WANDB_MODE decides if it is set.
        project: Project.
        entity: User or team; your default one if not set.
        group: Runs of one group are shown together.
        tags: Labels to find the run by.
        notes: A longer text about the run.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "lockstep"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None


def make_parser() -> ArgumentParser:
    """All keys of a config, as YAML files (``--config``, several are merged in their order) and dotted flags."""
    parser = ArgumentParser(
        prog="lockstep",
        description="Train, validate or test one LightningModule. Every key is a flag and a key of a --config file.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of keys; several are merged in their order.")
    parser.add_argument("--seed_everything", type=int, default=1, help="Decides weights, order, augmentation and dropout.")
    parser.add_argument("--run", type=RunOptions, default=RunOptions())
    parser.add_argument("--strategy", type=Literal["ddp"], default="ddp", help="How several ranks train together.")
    parser.add_argument("--ddp", type=DDPOptions, default=DDPOptions())
    parser.add_argument("--checkpoint", type=CheckpointOptions, default=CheckpointOptions())
    parser.add_argument("--wandb", type=WandbOptions, default=WandbOptions())
    parser.add_argument(
        "--shared_filesystem",
        type=bool,
        default=True,
        help="Nodes share their files: prepare_data runs once per job, else per node.",
    )
    parser.add_argument(
        "--ckpt_path", type=str | None, default=None, help="Checkpoint, or run folder, to start from or to evaluate."
    )
    parser.add_class_arguments(Trainer, "trainer", skip={*OWNED, "precision"}, instantiate=False)
    parser.add_argument(
        "--trainer.precision",
        type=Precision,
        default="auto",
        help="auto: bf16-mixed on GPUs that have it, else 32-true.",
    )
    parser.add_subclass_arguments(LightningModule, "model", required=True, fail_untyped=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True, fail_untyped=False)
    parser.link_arguments("seed_everything", "data.init_args.seed")
    return parser


def parse(arguments: Sequence[str]) -> tuple[ArgumentParser, Namespace]:
    """The parser and the complete config that ``arguments`` give; classes are imported, nothing is made yet.

    Raises:
        UsageError: A key or value is wrong: one sentence that names the key, the value and what would be valid.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # one's own modules, wherever the launcher lies
    parser = make_parser()
    if arguments and arguments[-2:-1] == ["--print_completion"]:
        print(completion(parser, arguments[-1]))
        sys.exit(0)
    try:
        config = parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(_damaged_yaml(arguments) or explain(parser, str(error))) from None
    if config.seed_everything < 0:
        raise UsageError(f"seed_everything: {config.seed_everything} must be 0 or more.")
    if config.checkpoint.best < 1:
        raise UsageError(f"checkpoint.best: {config.checkpoint.best} must be 1 or more.")
    return parser, config


def completion(parser: ArgumentParser, shell: str) -> str:
    """A script that makes ``bash``, ``zsh`` or ``tcsh`` complete the keys of a config, after ``local.py``.

    Not jsonargparse's own: that looks at every class that could stand anywhere and takes minutes. The keys of ``model`` and
    ``data`` are those of the shared classes.

    Raises:
        UsageError: There is no script for this shell.
    """
    if shell not in shtab.SUPPORTED_SHELLS:
        raise UsageError(f"print_completion: {shell!r} is not valid{did_you_mean(shell, shtab.SUPPORTED_SHELLS)}")
    plain = argparse.ArgumentParser(prog="local.py")
    for part, owner in (("model", "lockstep.module.Classifier"), ("data", "lockstep.data.base.ImageData")):
        for name in _arguments(owner):
            plain.add_argument(f"--{part}.{name}")
    for action in parser._actions:
        if action.option_strings and action.dest not in ("help", "==SUPPRESS=="):
            plain.add_argument(f"--{action.dest}", choices=action.choices)
    return shtab.complete(plain, shell)


def _damaged_yaml(arguments: Sequence[str]) -> str:
    """A sentence about the first config file that is no YAML; jsonargparse does not say which one it is."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        path = following if argument == "--config" else argument.removeprefix("--config=")
        if argument.startswith("--config") and Path(path).is_file():
            try:
                yaml.safe_load(Path(path).read_text())
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                return f"config: {path} is no valid YAML ({' '.join(str(error).split())})."
    return ""


def make_objects(parser: ArgumentParser, config: Namespace) -> Namespace:
    """The model, the data and the trainer's callbacks that ``config`` names.

    Raises:
        Exception: Whatever a class raises; jsonargparse's own wrapping of it is taken off.
    """
    try:
        made: Namespace = parser.instantiate(config)
    except ValueError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None
    return made


def explain(parser: ArgumentParser, text: str) -> str:
    """One sentence out of what jsonargparse says about a wrong key or value."""
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "==")]
    if unknown := re.search(r"[uU]nrecognized arguments: --([^\s=]+)[ =]?(\S*)", text):
        return _unknown_key(unknown[1], unknown[2], keys)
    if unknown := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return _unknown_key(f"{unknown[1]}.{unknown[2]}", "", keys)
    if unknown := re.search(r"(?:Key|option) [\"']?([\w.]+)[\"']? is not expected", text):
        return _unknown_key(unknown[1], "", keys)
    if missing := re.search(r"File does not exist: '(.+)'", text):
        return f"config: there is no file {missing[1]}."
    if missing := re.search(r'(?:Key "([^"]+)" is required|following arguments are required: --(\S+))', text):
        return f"{missing[1] or missing[2]}: must be set; a --config file usually does it, such as configs/digits.yaml."
    path = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)))
    value = _first(r"Got value: (.*)", text) or _first(r"val=['\"]?(.*?)['\"]?\)$", text) or _first(r"Given value: (.*)", text)
    if unknown := re.search(r"Option '([^']+)' is not accepted", text):
        owners = re.findall(r"class_path '([^']+)'", text[: unknown.start()])
        if not owners:
            return _unknown_key(unknown[1], "", keys)
        owner = owners[-1]
        given = _first(rf"'{unknown[1]}': ([^,}}]+)", text) or (value if "NestedArg" in text else "")
        return _unknown_key(f"{path}.{unknown[1]}", given, [f"{path}.{name}" for name in _arguments(owner)], owner)
    if base := _first(r"not correspond to a subclass of (\w+)", text):
        return f"{path}: {_class_path(value)} is no {base}."
    for pattern in (r"No module named .*", r"module '.*' has no attribute '.*'", r"cannot import name .*"):
        if problem := _first(f"({pattern})", text):
            return f"{path}: {_class_path(value)} does not exist ({problem}); run from the folder that holds your module."
    found = re.findall(r"^( *)(?:- )?Expected an? ([^\n]+?)(?:\. Got value.*)?$", text, flags=re.MULTILINE)
    # The deepest ones are about the value itself; the others are about what it is part of.
    if expected := list(dict.fromkeys(kind for indent, kind in found if indent == max(i for i, _ in found))):
        choices = [choice for item in expected for choice in re.findall(r"'([^']+)'", item) if "Literal" in item]
        hint = did_you_mean(value, choices) if choices else "."
        return f"{path}: {value!r} is not valid: expected {' or '.join(map(_type_name, expected))}{hint}"
    return " ".join(text.split())


def _unknown_key(key: str, value: str, valid: Iterable[str], owner: str = "") -> str:
    given = f" (value {value})" if value else ""
    if key.removeprefix("trainer.") in OWNED and key.startswith("trainer."):
        return f"{key}{given}: is not for a config; {OWNED[key.removeprefix('trainer.')]}."
    where = f" of {owner}" if owner else ""
    return f"{key}{given}: there is no such key{where}{did_you_mean(key, valid)}"


def _arguments(class_path: str) -> list[str]:
    """Names of the arguments of a class and of the classes above it that its own ``**kwargs`` go to."""
    names: list[str] = []
    with suppress(ImportError, ValueError, AttributeError):
        module, _, name = class_path.rpartition(".")
        for cls in inspect.getmro(getattr(importlib.import_module(module), name)):
            if "__init__" in vars(cls):
                parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
                names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
                if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                    break
    return [name for name in names if name != "self"]


def _class_path(value: str) -> str:
    return _first(r"class_path['\"]?: ['\"]?([\w.]+)", value) or value


def _type_name(text: str) -> str:
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return f"one of {choices[1]}"
    return {"NoneType": "null"}.get(name := re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", text), name)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, flags=re.MULTILINE)
    return found[1].strip() if found else ""
