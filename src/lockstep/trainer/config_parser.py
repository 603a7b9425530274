"""Parse a config with jsonargparse, and instantiate its classes."""

import argparse
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from types import MethodType
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import register_type
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, LRSchedulerTypeTuple, instantiate_class
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lockstep.compat.pytorch_lightning import import_as_lightning
from lockstep.compat.torch_builds import recover_build_locks
from lockstep.config import (
    FULL_PRECISIONS,
    RESERVED_TRAINER_KEYS,
    SHARED_CLASSES,
    Options,
    Precision,
    expand_home,
    select_section,
    split_keys,
)
from lockstep.config.validation import validate_arguments
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
    _add_trainer_arguments(parser)
    parser.add_subclass_arguments(LightningModule, "model", required=True, fail_untyped=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=False, fail_untyped=False)
    parser.add_subclass_arguments(Optimizer, "optimizer", required=False, instantiate=False, skip={"params"})
    parser.add_subclass_arguments(LRSchedulerTypeTuple, "lr_scheduler", required=False, instantiate=False, skip={"optimizer"})
    parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
    register_type(torch.device, deserializer=torch.device, deserializer_exceptions=RuntimeError)
    return parser


def _add_trainer_arguments(parser: ArgumentParser) -> None:
    parser.add_class_arguments(Trainer, "trainer", skip={*RESERVED_TRAINER_KEYS, "precision"}, instantiate=False)
    precision_help = "auto: bf16-mixed on GPUs that support it, else 32-true."
    parser.add_argument("--trainer.precision", type=Precision, default="auto", help=precision_help)


def parse_config(arguments: Sequence[str], command: str = "fit") -> tuple[ArgumentParser, Namespace]:
    """Validate and parse ``arguments``, without the command; classes are imported but not instantiated.

    Returns:
        The parser, and the complete config with all defaults.

    Raises:
        UsageError: A key or value is wrong; the message has the key, the value and what is valid.
    """
    search_working_folder()
    given = validate_arguments([command, *arguments])
    import_as_lightning()
    recover_build_locks()  # a user's module may build an op when it is imported
    import_modules(given)
    for key, value in split_keys(arguments):
        if key.endswith(".help"):
            print(describe_key(key.removesuffix(".help"), value, given))
            sys.exit(0)
    parser, arguments = make_parser(), select_section(arguments, command)
    is_shown = "--print_config" in arguments and given["model"] is not None  # without a model, jsonargparse shows what is set
    if is_shown:
        arguments.remove("--print_config")
    try:
        config = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UsageError(explain_parse_error(str(error))) from None
    expand_home(vars(config))
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


def describe_key(key: str, class_path: str, given: Mapping[str, Any]) -> str:
    """Describe the arguments of a section such as ``trainer``, or of a class that ``key`` may be set to.

    Args:
        class_path: The class; if empty, the one that the config ``given`` sets for ``key``.

    Raises:
        UsageError: The key has no arguments, or the class is not set or cannot be imported.
    """
    sections = {name: type(value) for name, value in vars(Options()).items() if is_dataclass(value)}
    parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    first, keys = key.partition(".")[0], [*sections, "trainer", "model", "data", "optimizer", "lr_scheduler"]
    if first not in keys:
        raise UsageError(f"{key}.help: unknown key{did_you_mean(first, keys, 'help')}")
    if key in sections:
        parser.add_class_arguments(sections[key], key)
    elif key == "trainer":
        _add_trainer_arguments(parser)
    elif found := class_path or _class_of(given, key):
        shared = {path.rpartition(".")[2]: path for paths in SHARED_CLASSES.values() for path in paths}
        try:
            kind = resolve_name(path := shared.get(found, found))
            if not callable(kind):
                raise ValueError("it is neither a class nor a function")
        except (ImportError, AttributeError, ValueError) as error:
            known = SHARED_CLASSES.get(key, ())
            raise UsageError(f"{key}.help: {found} cannot be imported ({error}){did_you_mean(found, known)}") from None
        print(f"{path}\n")
        add = parser.add_class_arguments if isinstance(kind, type) else parser.add_function_arguments
        add(kind, key, fail_untyped=False)
    else:
        such_as = f", such as {', '.join(SHARED_CLASSES[key])}" if key in SHARED_CLASSES else ""
        raise UsageError(f"{key}.help: no class is set; give one: --{key}.help CLASS{such_as}.")
    # jsonargparse lists all classes that are imported, which are hundreds of lines.
    return re.sub(r",?\s+known\s+subclasses:[^)]*\)", ")", parser.format_help()).lstrip()


def _class_of(config: Any, key: str) -> str:
    """Path of the class that a config sets for a dotted ``key``; empty if it sets none."""
    for name in key.split("."):
        config = config.get("init_args", config) if isinstance(config, Mapping) else {}
        config = config.get(name) if isinstance(config, Mapping) else None
    path = config.get("class_path") if isinstance(config, Mapping) else None
    return path if isinstance(path, str) else ""


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """Instantiate the model, the data and the trainer's callbacks; raise the error of a class, which jsonargparse wraps."""
    try:
        instances: Namespace = parser.instantiate(config)
    except ValueError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None
    return instances


def set_optimizer(module: LightningModule, config: Namespace) -> None:
    """Let ``module`` train with the ``optimizer`` and ``lr_scheduler`` of the config, if set, as LightningCLI does."""
    if config.optimizer is None:
        return
    if is_overridden("configure_optimizers", module):
        log.warning("optimizer: is used instead of configure_optimizers of %s", type(module).__name__)

    def configure_optimizers(self: LightningModule) -> Any:
        optimizer = instantiate_class(self.parameters(), config.optimizer.as_dict())
        schedule = config.lr_scheduler and instantiate_class(optimizer, config.lr_scheduler.as_dict())
        return LightningCLI.configure_optimizers(self, optimizer, schedule)

    module.configure_optimizers = MethodType(configure_optimizers, module)  # type: ignore[method-assign]
