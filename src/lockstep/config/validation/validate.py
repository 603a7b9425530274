"""What is wrong with the arguments of a run, told in milliseconds: without torch, and without importing anyone's classes.

The run itself (``config.parse``, then the classes) knows more; what it would take is never refused here.
"""

import ast
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lockstep.config import (
    COMMANDS,
    GROUPS,
    RESERVED_TRAINER_KEYS,
    Options,
    check_ranges,
    class_not_set,
    expected_mapping,
    invalid_key_type,
    missing_key,
    read_config_file,
    split_arguments,
    unknown_key,
)
from lockstep.config.validation.annotation import ANYTHING, ExpectedType, expected_type
from lockstep.config.validation.lookup import NotDefined, SourceIndex
from lockstep.config.validation.signature import Argument, Signature, signature
from lockstep.config.validation.source import Undecidable
from lockstep.config.validation.values import BASES, ValueMerger
from lockstep.core import UsageError, did_you_mean


def validate_arguments(
    arguments: Sequence[str],
    launcher_flags: Iterable[str] = (),
    folders: Sequence[Path] = (),
    sweep: Mapping[str, Sequence[str]] | None = None,
    elsewhere: bool = False,
) -> dict[str, Any]:
    """The config that ``arguments`` give, as far as it can be known without importing a class; defaults are lockstep's own.

    With a sweep, that of its first run; every value is checked once, together with the first ones of the other keys.

    Args:
        arguments: As for ``lockstep.train``: a command or none, then ``--config FILE`` and keys with their values.
        launcher_flags: The launcher's own flags, without dashes; a misspelt one may be meant.
        folders: Where one's own modules are looked for before ``sys.path``.
        sweep: Keys and the values that they take in turn, after ``arguments``.
        elsewhere: Whether the run has another Python, whose packages need not be here.

    Raises:
        UsageError: A command, key, value, file or class is certainly wrong: one sentence that names it and what is valid.
    """
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        if rest[0] not in COMMANDS:
            raise UsageError(f"{rest[0]!r} is no command{did_you_mean(rest[0], COMMANDS)}")
        del rest[0]
    config = ConfigValidator(SourceIndex(folders, elsewhere), launcher_flags)
    given = split_arguments(rest)
    for key, value in given:
        config.take(key, value)
    if any(_shows_only(key) for key, _ in given):
        return config.content
    common = config.content
    first: dict[str, Any] | None = None
    for point in _points_to_check(sweep or {}):
        config.content = copy.deepcopy(common)
        for key, value in point.items():
            config.take(key, value)
        config.check_complete()
        first = first or config.content
    return first or common


def _points_to_check(sweep: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """The first value of every key, then each further value of each key."""
    first = {key: values[0] for key, values in sweep.items()}
    yield first
    for key, values in sweep.items():
        yield from (first | {key: value} for value in values[1:])


def shows_only(argument: str) -> bool:
    """Whether an argument shows something instead of starting a run."""
    return argument.startswith("--") and _shows_only(argument[2:].partition("=")[0])


def _shows_only(key: str) -> bool:
    """Whether a key shows something instead of starting a run."""
    return key.endswith(".help") or key in ("help", "print_config", "print_completion", "print_shtab")


class ConfigValidator:
    """A config while it is put together.

    Args:
        sources: Where classes are looked up.
        launcher_flags: What else could have been meant by a key that does not exist.

    Attributes:
        content: What was given so far, and the defaults of lockstep's own keys.
    """

    def __init__(self, sources: SourceIndex, launcher_flags: Iterable[str]) -> None:
        self.content: dict[str, Any] = {**asdict(Options()), "trainer": {}, "model": None, "data": None}
        self._sources, self._values, self._launcher_flags = sources, ValueMerger(sources), list(launcher_flags)
        self._paths = {name: f"lockstep.config.schema.{type(getattr(Options(), name)).__name__}" for name in GROUPS}
        self._paths |= {"": "lockstep.config.schema.Options", "trainer": "lightning.pytorch.trainer.trainer.Trainer"}
        self._groups: dict[str, Signature] = {}

    def take(self, key: str, value: Any) -> None:
        """Set a key, as a flag or a config file gives it."""
        first, *rest = key.split(".")
        if _shows_only(key) or key == "$schema":
            return
        if key == "config":
            self._take_file(value)
        elif first in BASES:
            self._take_class(first, rest, value)
        elif first and first in self._paths and not rest:
            self._take_group(first, value)
        elif first and first in self._paths:
            self._set(self.content[first], self._group(first), rest, value, f"{first}.")
        else:
            self._set(self.content, self._group(""), [first, *rest], value, "")

    def _set(self, store: dict[str, Any], takes: Signature, names: Sequence[str], value: Any, before: str) -> None:
        name, *rest = names
        add, name = name.endswith("+") and not rest, name.rstrip("+")
        key, argument = before + name, takes.arguments.get(name)
        if argument is None and takes.closed:
            others = self._launcher_flags if not before and not rest else []
            raise UsageError(unknown_key(before + ".".join(names), value, [*self.keys(), *others]))
        kind, current = expected_type(self._sources, argument) if argument else ANYTHING, store.get(name)
        if add:
            store[name] = self._values.append(current, kind, value, key)
        else:
            store[name] = self._values.put(current, kind, rest, value, key)

    def _take_file(self, given: Any) -> None:
        if not isinstance(given, str):
            return
        outer = self._values.folder
        content = read_config_file(given, outer)
        self._values.folder = (outer / given).parent
        for key, value in content.items():
            if not isinstance(key, str):
                raise UsageError(invalid_key_type(f"config: {given}", key))
            self.take(key, value)
        self._values.folder = outer

    def _take_class(self, key: str, rest: Sequence[str], value: Any) -> None:
        current, given = self.content[key], self._values.mapping(value)
        if current is None and (rest or (given is not None and "class_path" not in given)):
            raise UsageError(class_not_set(key, ".".join([key, *rest]), value))
        self.content[key] = self._values.put(current, ExpectedType(classes=(BASES[key],)), rest, value, key)

    def _take_group(self, name: str, value: Any) -> None:
        content = self._values.mapping(value)
        if content is None:
            raise UsageError(expected_mapping(name, value))
        for key, item in content.items():
            self.take(f"{name}.{key}", item)

    def _group(self, name: str) -> Signature:
        """The keys of a group; of the top level for an empty name."""
        if name not in self._groups:
            try:
                takes = signature(self._sources, self._sources.find(self._paths[name]))
            except (Undecidable, NotDefined):
                takes = Signature()
            if name == "trainer":
                own = Argument(
                    "precision", self._sources.module("lockstep.config.schema"), ast.Name("Precision"), ast.Constant("auto")
                )
                others = {key: argument for key, argument in takes.arguments.items() if key not in RESERVED_TRAINER_KEYS}
                takes = Signature({**others, "precision": own}, takes.closed)
            self._groups[name] = takes
        return self._groups[name]

    def keys(self) -> list[str]:
        """All keys but those of classes."""
        groups = [f"{name}.{key}" for name in self._paths if name for key in self._group(name).arguments]
        return [*self._group("").arguments, "trainer", *BASES, "config", *groups]

    def check_complete(self) -> None:
        """Raise about what only the whole config shows."""
        for key in BASES:
            if self.content[key] is None:
                raise UsageError(missing_key(key))
        self._values.check_ambiguous_names()
        for key, base in BASES.items():
            self._values.check_complete(self.content[key], ExpectedType(classes=(base,)), key, linked="data.seed")
        for name, argument in self._group("trainer").arguments.items() if self.content["trainer"] else ():
            if name in self.content["trainer"]:
                kind = expected_type(self._sources, argument)
                self._values.check_complete(self.content["trainer"][name], kind, f"trainer.{name}")
        for path in self.content["activation_checkpointing"]:
            self._values.check_exists(path, "activation_checkpointing")
        check_ranges(self.content["seed_everything"], self.content["checkpoint"]["save_top_k"], self.content["trainer"])
