"""Parse a config with jsonargparse, and instantiate its classes."""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import shtab
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import register_type
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, LRSchedulerTypeTuple, instantiate_class
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lockstep.compat.pytorch_lightning import import_as_lightning
from lockstep.compat.torch_builds import recover_build_locks
from lockstep.config import FULL_PRECISIONS, RESERVED_TRAINER_KEYS, Options, Precision, select_section
from lockstep.config.validation import known_keys, validate_arguments
from lockstep.core import UsageError, did_you_mean
from lockstep.trainer.parse_errors import explain_parse_error, import_modules
from lockstep.trainer.saved_config import dump_config

log = logging.getLogger(__name__)


@cache
def make_parser() -> ArgumentParser:
    """The parser of all keys, as YAML files (``--config``; later files override earlier ones) and dotted flags."""
    parser = ArgumentParser(
        prog="lockstep",
        description="Train, evaluate or predict with a LightningModule. Every key is a flag and a key of a --config file.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of keys; later files override earlier ones.")
    parser.add_class_arguments(Options, instantiate=False)
    parser.add_class_arguments(Trainer, "trainer", skip={*RESERVED_TRAINER_KEYS, "precision"}, instantiate=False)
    precision_help = "auto: bf16-mixed on GPUs that support it, else 32-true."
    parser.add_argument("--trainer.precision", type=Precision, default="auto", help=precision_help)
    parser.add_subclass_arguments(LightningModule, "model", required=True, fail_untyped=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=False, fail_untyped=False)
    parser.add_subclass_arguments(Optimizer, "optimizer", required=False, instantiate=False, skip={"params"})
    parser.add_subclass_arguments(LRSchedulerTypeTuple, "lr_scheduler", required=False, instantiate=False, skip={"optimizer"})
    parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
    register_type(torch.device, deserializer=torch.device, deserializer_exceptions=RuntimeError)
    return parser


def parse_config(arguments: Sequence[str], command: str = "fit") -> tuple[ArgumentParser, Namespace]:
    """Validate and parse ``arguments``, without the command; classes are imported but not instantiated.

    Returns:
        The parser, and the complete config with all defaults.

    Raises:
        UsageError: A key or value is wrong; the message has the key, the value and what is valid.
    """
    search_working_folder()
    if arguments and arguments[-2:-1] == ["--print_completion"]:
        print(completion(arguments[-1]))
        sys.exit(0)
    given = validate_arguments([command, *arguments])
    import_as_lightning()
    recover_build_locks()  # a user's module may build an op when it is imported
    import_modules(given)
    parser, arguments = make_parser(), select_section(arguments, command)
    is_shown = "--print_config" in arguments and given["model"] is not None  # else jsonargparse shows the keys that are known
    if is_shown:
        arguments.remove("--print_config")
    try:
        config = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UsageError(explain_parse_error(str(error))) from None
    precision = config.trainer.precision
    config.trainer.precision = FULL_PRECISIONS.get(str(precision), precision)
    if is_shown:
        print(dump_config(parser, config), end="")
        sys.exit(0)
    return parser, config


def search_working_folder() -> None:
    """Let Python find the user's modules in the current folder."""
    if not sys.flags.safe_path and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


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


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """Instantiate the model, the data and the trainer's callbacks; raise what a class raises, as jsonargparse does not."""
    try:
        instances: Namespace = parser.instantiate(config)
    except ValueError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None
    return instances


def set_optimizer(module: LightningModule, config: Namespace) -> None:
    """Let ``module`` train with the ``optimizer`` and ``lr_scheduler`` of the config, if it has any, as LightningCLI does."""
    if config.optimizer is None:
        return
    if is_overridden("configure_optimizers", module):
        log.warning("optimizer: is used instead of configure_optimizers of %s", type(module).__name__)

    def configure_optimizers(self: LightningModule) -> Any:
        optimizer = instantiate_class(self.parameters(), config.optimizer.as_dict())
        schedule = config.lr_scheduler and instantiate_class(optimizer, config.lr_scheduler.as_dict())
        return LightningCLI.configure_optimizers(self, optimizer, schedule)

    module.configure_optimizers = MethodType(configure_optimizers, module)  # type: ignore[method-assign]
