"""What to train: the keys of a config, and one clear sentence for each that is wrong."""

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import shtab
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lockstep.config import COMMANDS, GROUPS, RESERVED_TRAINER_KEYS, Options, Precision, check_ranges, expected_mapping
from lockstep.core import UsageError, did_you_mean
from lockstep.trainer.parse_errors import argument_names, explain_parse_error


def make_parser() -> ArgumentParser:
    """All keys of a config, as YAML files (``--config``, several are merged in their order) and dotted flags."""
    parser = ArgumentParser(
        prog="lockstep",
        description="Train, evaluate or predict with one LightningModule. Every key is a flag and a key of a --config file.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of keys; several are merged in their order.")
    parser.add_class_arguments(Options, instantiate=False)
    parser.add_class_arguments(Trainer, "trainer", skip={*RESERVED_TRAINER_KEYS, "precision"}, instantiate=False)
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


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command that ``arguments`` begin with, fit by default, and the rest."""
    if not arguments or arguments[0].startswith("-"):
        return "fit", list(arguments)
    if arguments[0] not in COMMANDS:
        raise UsageError(f"{arguments[0]!r} is no command{did_you_mean(arguments[0], COMMANDS)}")
    return arguments[0], list(arguments[1:])


def parse_config(arguments: Sequence[str]) -> tuple[ArgumentParser, Namespace]:
    """The parser and the complete config that ``arguments`` give; classes are imported, nothing is made yet.

    Raises:
        UsageError: A key or value is wrong: one sentence that names the key, the value and what would be valid.
    """
    if not sys.flags.safe_path and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # one's own modules, wherever the launcher lies
    parser = make_parser()
    if arguments and arguments[-2:-1] == ["--print_completion"]:
        print(completion(parser, arguments[-1]))
        sys.exit(0)
    try:
        config = parser.parse_args(list(arguments))
    except ArgumentError as error:
        keys = [action.dest for action in parser._actions if action.dest != "help"]
        raise UsageError(explain_parse_error(str(error), keys, arguments)) from None
    for group in (*GROUPS, "trainer"):
        if not isinstance(config[group], Namespace):
            raise UsageError(expected_mapping(group, config[group]))
    check_ranges(config.seed_everything, config.checkpoint.save_top_k, vars(config.trainer))
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
    for part, owner in (("model", "lockstep.models.Classifier"), ("data", "lockstep.data.ImageData")):
        for name in argument_names(owner):
            plain.add_argument(f"--{part}.{name}")
    for action in parser._actions:
        if action.option_strings and action.dest not in ("help", "==SUPPRESS=="):
            plain.add_argument(f"--{action.dest}", choices=action.choices)
    return shtab.complete(plain, shell)


def dump_config(parser: ArgumentParser, config: Namespace) -> str:
    """The complete config as YAML; given back with ``--config`` it is the same.

    Raises:
        UsageError: It holds something that YAML cannot, such as the default of a class that it names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is raised next
            return str(parser.dump(config, skip_unset=False))
    except ValueError as error:
        found = re.search(r"importable object, given (\S+):", str(error))
        what = f"{found[1]!r}, a default of a class that it names" if found else " ".join(str(error).split())
        raise UsageError(
            f"The config cannot be written down: it holds {what}; set that argument yourself, as text (such as "
            "trainer.callbacks.device=cpu)."
        ) from None


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
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
