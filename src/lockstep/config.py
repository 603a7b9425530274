"""What to train: the keys of a config, and one clear sentence for each that is wrong."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import shtab
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lockstep.errors import UsageError
from lockstep.explain import OWNED, arguments_of, explain
from lockstep.nearest import did_you_mean
from lockstep.strategy import DDPOptions

Precision = Literal["auto", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"]


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
        keys = [action.dest for action in parser._actions if action.dest != "help"]
        raise UsageError(explain(str(error), keys, arguments)) from None
    if not 0 <= config.seed_everything < 2**32:
        raise UsageError(f"seed_everything: {config.seed_everything} must be 0 or more, and less than 2**32.")
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
    for name in ("nodes", "ranks"):  # the launcher's own
        plain.add_argument(f"--{name}")
    for part, owner in (("model", "lockstep.module.Classifier"), ("data", "lockstep.data.base.ImageData")):
        for name in arguments_of(owner):
            plain.add_argument(f"--{part}.{name}")
    for action in parser._actions:
        if action.option_strings and action.dest not in ("help", "==SUPPRESS=="):
            plain.add_argument(f"--{action.dest}", choices=action.choices)
    return shtab.complete(plain, shell)


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
