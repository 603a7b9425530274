"""Parse a config with jsonargparse, write it as YAML, and instantiate its classes."""

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import shtab
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lockstep.config import RESERVED_TRAINER_KEYS, Options, Precision
from lockstep.config import split_command as split_command
from lockstep.config.validation import known_keys, validate_arguments
from lockstep.core import UsageError, did_you_mean
from lockstep.trainer.parse_errors import explain_parse_error


def make_parser() -> ArgumentParser:
    """Make the parser of all keys, as YAML files (``--config``; later files override earlier ones) and dotted flags."""
    parser = ArgumentParser(
        prog="lockstep",
        description="Train, evaluate or predict with a LightningModule. Every key is a flag and a key of a --config file.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of keys; later files override earlier ones.")
    parser.add_class_arguments(Options, instantiate=False)
    parser.add_class_arguments(Trainer, "trainer", skip={*RESERVED_TRAINER_KEYS, "precision"}, instantiate=False)
    parser.add_argument(
        "--trainer.precision",
        type=Precision,
        default="auto",
        help="auto: bf16-mixed on GPUs that support it, else 32-true.",
    )
    parser.add_subclass_arguments(LightningModule, "model", required=True, fail_untyped=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True, fail_untyped=False)
    parser.link_arguments("seed_everything", "data.init_args.seed")
    return parser


def parse_config(arguments: Sequence[str]) -> tuple[ArgumentParser, Namespace]:
    """Validate and parse ``arguments``; classes are imported but not instantiated.

    Returns:
        The parser, and the complete config with all defaults.

    Raises:
        UsageError: A key or value is wrong; the message has the key, the value and what is valid.
    """
    if not sys.flags.safe_path and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # for the user's modules
    if arguments and arguments[-2:-1] == ["--print_completion"]:
        print(completion(arguments[-1]))
        sys.exit(0)
    validate_arguments(arguments)
    parser = make_parser()
    try:
        return parser, parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(explain_parse_error(str(error))) from None


def completion(shell: str) -> str:
    """Make a completion script of all keys for ``bash``, ``zsh`` or ``tcsh``, to use after ``local.py``.

    jsonargparse's own script takes minutes: it searches every class that any key accepts.

    Raises:
        UsageError: The shell is not supported.
    """
    if shell not in shtab.SUPPORTED_SHELLS:
        raise UsageError(f"print_completion: {shell!r} is not valid{did_you_mean(shell, shtab.SUPPORTED_SHELLS)}")
    parser = argparse.ArgumentParser(prog="local.py")
    for name in ("nodes", "ranks", *known_keys()):
        parser.add_argument(f"--{name}")
    return shtab.complete(parser, shell)


def dump_config(parser: ArgumentParser, config: Namespace) -> str:
    """Write the complete config as YAML, which ``--config`` reads back unchanged.

    Raises:
        UsageError: YAML cannot represent a value, such as an object that is the default of an argument.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the value of the exception
            return str(parser.dump(config, skip_unset=False))
    except ValueError as error:
        found = re.search(r"importable object, given (\S+):", str(error))
        what = f"{found[1]!r}, the default of an argument" if found else " ".join(str(error).split())
        raise UsageError(
            f"The config cannot be written as YAML: it contains {what}; set that argument as text (such as "
            "trainer.callbacks.device=cpu)."
        ) from None


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """Instantiate the model, the data and the trainer's callbacks.

    Raises:
        Exception: An exception of a class, without the one that jsonargparse wraps around it.
    """
    try:
        instances: Namespace = parser.instantiate(config)
    except ValueError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None
    return instances
