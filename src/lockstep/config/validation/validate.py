"""Validate the arguments of a run without torch and without importing a class.

Parsing in the run (``trainer.parse_config``) finds more errors; validation never refuses what the run would accept.
"""

import ast
import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from lockstep.config import (
    OPTIMIZERS,
    RESERVED_TRAINER_KEYS,
    MissingValue,
    Options,
    check_data,
    check_ranges,
    check_secrets,
    check_trainer_classes,
    expand_home,
    messages,
    read_config_file,
    select_section,
    split_command,
    split_keys,
)
from lockstep.config.validation.annotation import ANYTHING, ExpectedType, expected_type, parse_scalar
from lockstep.config.validation.lookup import NotDefined, SourceIndex
from lockstep.config.validation.signature import Argument, Signature, signature
from lockstep.config.validation.source import Undecidable
from lockstep.config.validation.values import BASES, OPTIONAL_CLASSES, ValueMerger
from lockstep.core import UsageError, did_you_mean


def validate_arguments(
    arguments: Sequence[str],
    launcher_flags: Iterable[str] = (),
    folders: Sequence[Path] = (),
    elsewhere: bool = False,
) -> dict[str, Any]:
    """Merge ``arguments`` into a config, as far as possible without imports; defaults are those of lockstep's own keys.

    Args:
        arguments: A command or none, then ``--config FILE`` and keys with their values.
        launcher_flags: Flags of the launcher, without dashes, to suggest for a misspelt one.
        folders: Folders to search for modules before ``sys.path``.
        elsewhere: Whether the run uses another Python, whose packages need not be installed here.

    Raises:
        UsageError: A command, key, value, file or class is certainly wrong.
    """
    return validate_sweep(arguments, {}, launcher_flags, folders, elsewhere)[0]


def validate_sweep(
    arguments: Sequence[str],
    sweep: Mapping[str, Sequence[str]],
    launcher_flags: Iterable[str] = (),
    folders: Sequence[Path] = (),
    elsewhere: bool = False,
) -> list[dict[str, Any]]:
    """Merge ``arguments`` with each value of a sweep, and with the first values of its other keys; see ``validate_arguments``.

    The first config is that of the first run.
    """
    config = ConfigValidator(SourceIndex(folders, elsewhere), launcher_flags)
    command, keyed = split_command(arguments)
    try:
        keys = split_keys(select_section(keyed, command))
    except MissingValue as missing:
        config.check_key(missing.key)
        raise
    for key, value in keys:
        config.set_key(key, value)
    if any(_is_help_key(key) for key, _ in keys):
        return [config.content]
    common, configs = config.content, []
    start = {key: values[0] for key, values in sweep.items()}
    for point in [start, *(start | {key: value} for key, values in sweep.items() for value in values[1:])]:
        config.content = copy.deepcopy(common)
        for key, value in point.items():
            config.set_key(key, value)
        config.check_complete(command)
        configs.append(config.content)
    return configs


def shows_only(argument: str) -> bool:
    """Whether an argument, such as --help or --print_config, shows something instead of starting a run."""
    return argument.startswith("--") and _is_help_key(argument[2:].partition("=")[0])


def _is_help_key(key: str) -> bool:
    return key.endswith(".help") or key in ("help", "print_config", "print_shtab")


def known_keys() -> dict[str, ExpectedType]:
    """All keys of a config except ``config``, with the arguments of lockstep's own classes, and their values."""
    sources = SourceIndex()
    found = {key: ANYTHING for key in _CLASSES}
    groups = ConfigValidator(sources, ()).groups()
    for key, path in (("model", "lockstep.models.Classifier"), ("data", "lockstep.data.ImageData")):
        groups[key] = signature(sources, sources.find(path))
    for group, keys in groups.items():
        found |= {f"{group}.{name}".lstrip("."): expected_type(sources, argument) for name, argument in keys.arguments.items()}
    return found


_CLASSES = {**BASES, **OPTIONAL_CLASSES}

_LOADERS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
"""The loader that each command needs."""


class ConfigValidator:
    """A config that is merged and checked key by key.

    Args:
        launcher_flags: Further names to suggest for an unknown key.

    Attributes:
        content: The values so far, and the defaults of lockstep's own keys.
    """

    def __init__(self, sources: SourceIndex, launcher_flags: Iterable[str]) -> None:
        options = Options()
        self._open_files: list[str] = []
        self.content: dict[str, Any] = {**asdict(options), "trainer": {}, **dict.fromkeys(_CLASSES)}
        self._sources, self._values, self._launcher_flags = sources, ValueMerger(sources), list(launcher_flags)
        self._keys = self._keys_of("lockstep.config.schema.Options")
        groups = {name: type(value).__name__ for name, value in vars(options).items() if is_dataclass(value)}
        self._groups = {name: self._keys_of(f"lockstep.config.schema.{cls}") for name, cls in groups.items()}
        trainer = self._keys_of("lightning.pytorch.trainer.trainer.Trainer")
        others = {name: argument for name, argument in trainer.arguments.items() if name not in RESERVED_TRAINER_KEYS}
        schema = sources.module("lockstep.config.schema")
        precision = Argument("precision", schema, ast.Name("Precision"), ast.Constant("auto"))
        self._groups["trainer"] = Signature({**others, "precision": precision}, trainer.closed)

    def _keys_of(self, path: str) -> Signature:
        try:
            return signature(self._sources, self._sources.find(path))
        except (Undecidable, NotDefined):
            return Signature()

    def check_key(self, key: str) -> None:
        """Raise UsageError if ``key``, which has no value, certainly does not exist."""
        first, *rest = key.split(".")
        group = self._groups.get(first) if rest else self._keys
        if first in _CLASSES or (first in self._groups and not rest) or key == "config":
            return
        if group is None or (group.closed and (rest or [first])[0].rstrip("+") not in group.arguments):
            others = [] if rest else [*self._class_arguments(), *self._launcher_flags]
            raise UsageError(messages.unknown_key(key, "", [*self.keys(), *others]))

    def set_key(self, key: str, value: Any) -> None:
        """Set a key to its value in a flag or config file; raise UsageError if it is certainly wrong."""
        first, *rest = key.split(".")
        if _is_help_key(key) or key == "$schema":
            return
        if key == "config":
            self._merge_file(value)
        elif first in _CLASSES:
            self._set_class(first, rest, value)
        elif first not in self._groups:
            self._set_in_group(self.content, self._keys, [first, *rest], value, "")
        elif rest:
            self._set_in_group(self.content[first], self._groups[first], rest, value, f"{first}.")
        else:
            mapping = self._values.mapping(value)
            if mapping is None:
                raise UsageError(messages.expected_mapping(first, value))
            for name, item in mapping.items():
                self.set_key(f"{first}.{name}", item)

    def _set_in_group(self, group: dict[str, Any], keys: Signature, names: Sequence[str], value: Any, prefix: str) -> None:
        name, *rest = names
        append, name = name.endswith("+") and not rest, name.rstrip("+")
        key, argument = prefix + name, keys.arguments.get(name)
        if argument is None and keys.closed:
            others = [*self._class_arguments(), *self._launcher_flags] if not prefix and not rest else []
            raise UsageError(messages.unknown_key(prefix + ".".join(names), value, [*self.keys(), *others]))
        expected, current = expected_type(self._sources, argument) if argument else ANYTHING, group.get(name)
        if append:
            group[name] = self._values.append(current, expected, value, key)
        else:
            group[name] = self._values.merge(current, expected, rest, value, key)

    def _merge_file(self, source: Any) -> None:
        if not isinstance(source, str):
            return
        outer, outer_file = self._values.folder, self._values.file
        content = read_config_file(source, outer)
        if (file := os.path.realpath(outer / source)) in self._open_files:
            raise UsageError(f"config: {source} includes itself; remove one of the keys config.")
        self._open_files.append(file)
        self._values.folder, self._values.file = (outer / source).parent, (source, outer)
        for key, value in content.items():
            if not isinstance(key, str):
                raise UsageError(messages.invalid_key_type(f"config: {' '.join(source.split())}", key))
            self.set_key(key, value)
        self._values.folder, self._values.file = outer, outer_file
        self._open_files.pop()

    def _set_class(self, key: str, rest: Sequence[str], value: Any) -> None:
        if not rest and (value is None or parse_scalar(str(value)) is None):
            self.content[key] = None
            return
        if rest == ["class_path"]:
            rest, value = [], {"class_path": value}
        current, mapping = self.content[key], self._values.mapping(value)
        sets_class = mapping is None or any(str(name).split(".")[0] == "class_path" for name in mapping)
        if current is None and (rest or not sets_class):
            raise UsageError(messages.class_not_set(key, ".".join([key, *rest]), value))
        self.content[key] = self._values.merge(current, ExpectedType(classes=(_CLASSES[key],)), rest, value, key)

    def _check_optimizer(self) -> None:
        """Raise UsageError if the optimizer or the learning rate of the shared classifier is not valid."""
        model = self.content["model"] or {}
        if model.get("class_path") != "lockstep.models.Classifier":
            return
        arguments = model.get("init_args", {})
        name, lr = arguments.get("optimizer"), arguments.get("lr")
        if isinstance(lr, int | float) and not lr > 0:  # NaN too
            raise UsageError(f"model.lr: {lr:g} must be greater than 0.")
        if not isinstance(name, str) or name in OPTIMIZERS:
            return
        try:
            if "." in name:
                self._sources.find(name)
                return
        except Undecidable:
            return
        except NotDefined:
            pass
        known = [*OPTIMIZERS, "torch.optim.Adam", "torch.optim.RMSprop"]
        raise UsageError(
            f"model.optimizer: {name!r} is neither of {', '.join(OPTIMIZERS)} nor the import path of a class"
            f"{did_you_mean(name, known)}"
        )

    def _class_arguments(self) -> list[str]:
        """Arguments of the model and the data, as far as their classes are known."""
        found = []
        for key in BASES:
            value = self.content[key]
            path = value.get("class_path") if isinstance(value, dict) else None
            if isinstance(path, str):
                with suppress(Undecidable, NotDefined):
                    found += [f"{key}.{name}" for name in signature(self._sources, self._sources.find(path)).arguments]
        return found

    def groups(self) -> dict[str, Signature]:
        """The keys of each group; keys without a group have the empty name."""
        return {"": self._keys, **self._groups}

    def keys(self) -> list[str]:
        """All keys except arguments of classes."""
        groups = [f"{name}.{key}" for name, group in self._groups.items() for key in group.arguments]
        return [*self._keys.arguments, "trainer", *_CLASSES, "config", *groups]

    def check_complete(self, command: str) -> None:
        """Raise UsageError if the whole config lacks a value, names an unknown class or has a number out of range."""
        if self.content["model"] is None:
            raise UsageError(messages.missing_key("model"))
        loader = f"{_LOADERS[command]}_dataloader"
        if self.content["data"] is None and not self._values.may_define(self.content["model"], loader):
            raise UsageError(f"{messages.missing_key('data')[:-1]}; the model itself has no {loader}.")
        if self.content["lr_scheduler"] is not None and self.content["optimizer"] is None:
            raise UsageError("lr_scheduler: needs an optimizer at the top level too; set optimizer.")
        self._values.check_short_names()
        for key, base in BASES.items():
            self._values.check_required(self.content[key], ExpectedType(classes=(base,)), key, linked="data.seed")
        for name, argument in self._groups["trainer"].arguments.items():
            if name in self.content["trainer"]:
                expected = expected_type(self._sources, argument)
                self._values.check_required(self.content["trainer"][name], expected, f"trainer.{name}")
        for path in filter(None, self.content["activation_checkpointing"]):
            self._values.class_signature(path, "activation_checkpointing")
        self._check_optimizer()
        expand_home(self.content)
        check_data(self.content["data"])
        check_ranges(self.content)
        check_secrets(self.content)
        check_trainer_classes(self.content["trainer"])
