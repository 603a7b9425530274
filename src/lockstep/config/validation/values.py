"""Values as jsonargparse merges them, one after the other; what the class that takes them cannot take is refused."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.config import (
    SHARED_CLASSES,
    class_not_set,
    expected_mapping,
    invalid_key_type,
    missing_class,
    missing_key,
    missing_module,
    parse_collection,
    read_config_file,
    unknown_class_name,
    unknown_key,
    wrong_base_class,
    wrong_value,
)
from lockstep.config.validation.annotation import ANYTHING, INVALID, ExpectedType, expected_type, parse_scalar
from lockstep.config.validation.lookup import Definition, NotDefined, SourceIndex
from lockstep.config.validation.names import classes_below, classes_near, function_names
from lockstep.config.validation.signature import Signature, class_hierarchy, signature
from lockstep.config.validation.source import Undecidable
from lockstep.core import UsageError, did_you_mean

BASES = {"model": Definition("lightning.pytorch.LightningModule"), "data": Definition("lightning.pytorch.LightningDataModule")}
"""The keys that are classes themselves, and what these must be."""


_SPEC = {"class_path", "init_args", "dict_kwargs"}


_CALLBACKS = "lightning.pytorch.callbacks"


_FAMILIAR = {"lockstep", "lightning", "torch", "torchvision", "torchmetrics"}


class ValueMerger:
    """What is known of the classes of a config while it is put together.

    Args:
        sources: Where classes are looked up.

    Attributes:
        folder: Where a relative path in a value begins.
    """

    def __init__(self, sources: SourceIndex) -> None:
        self.sources, self.folder = sources, Path()
        self._signatures: dict[str, Signature] = {}
        self._doubts: list[tuple[str, str, list[str]]] = []

    def put(self, current: Any, kind: ExpectedType, rest: Sequence[str], value: Any, key: str) -> Any:
        """What becomes of ``current`` when ``value`` is given.

        Args:
            current: The value so far.
            kind: What is expected.
            rest: The part of the value that is given: the names of an argument of its class, of an argument of that one's
                class, and so on; none for the whole value.
            value: As it was typed, or as a config file has it.
            key: What ``current`` is the value of, for sentences.

        Raises:
            UsageError: It is certainly wrong.
        """
        if rest:
            return self._within(current, kind, rest, value, key)
        if value is None:
            return None
        plain = parse_collection(value)
        if kind.anything or (kind.mappings and self.mapping(value) is not None):
            return plain
        if isinstance(plain, Mapping) and kind.classes:
            return self._spec(current, plain, kind, key)
        if isinstance(plain, list) and kind.items:
            before = current if isinstance(current, list) and len(current) == len(plain) else [None] * len(plain)
            return [self.put(old, kind.items, [], item, key) for old, item in zip(before, plain, strict=True)]
        for candidate in (plain, value):
            if (made := kind.accept(candidate)) is not INVALID:
                return made
        if isinstance(value, str) and kind.classes:
            return self._spec(current, self.mapping(value) or {"class_path": value}, kind, key)
        if isinstance(value, str) and kind.items and not kind.items.simple:
            return value  # it may be a file
        words = [choice for choice in kind.choices if isinstance(choice, str)]
        raise UsageError(wrong_value(key, value, kind.names, words))

    def append(self, current: Any, kind: ExpectedType, value: Any, key: str) -> Any:
        """What becomes of a list when one or several items are added to it."""
        if kind.items is None and not kind.anything:
            raise UsageError(unknown_key(f"{key}+", value, [key]))
        plain = parse_collection(value)
        before = current if isinstance(current, list) else [] if current is None else [current]
        return [
            *before,
            *(self.put(None, kind.items or kind, [], item, key) for item in (plain if isinstance(plain, list) else [value])),
        ]

    def mapping(self, value: Any) -> dict[Any, Any] | None:
        """The keys and values that are meant by a mapping, by a YAML text or by a file's name; None if it is none of them."""
        plain = parse_collection(value)
        try:
            if isinstance(plain, str) and (self.folder / plain).is_file():
                return read_config_file(plain, self.folder)
        except (UsageError, OSError):
            return None
        return plain if isinstance(plain, dict) else None

    def _within(self, current: Any, kind: ExpectedType, rest: Sequence[str], value: Any, key: str) -> Any:
        if isinstance(current, list) and current:
            return [*current[:-1], self._within(current[-1], kind, rest, value, key)]
        inner = [kind, *([kind.items] if kind.items else [])]
        if not any(item.classes or item.anything or item.mappings for item in inner):
            raise UsageError(unknown_key(".".join([key, *rest]), value, [key]))
        classes = [item for item in inner if item.classes]
        if classes and not kind.anything and not kind.mappings:
            if isinstance(current, str):
                current = self._spec(None, {"class_path": current}, classes[0], key)
            if _is_spec(current):
                return self._argument(current, rest, value, classes[0], key)
            if current is None and kind.default is None and not any(self._takes(found, rest[0]) for found in kind.classes):
                raise UsageError(class_not_set(key, ".".join([key, *rest]), value))
        return _nested(current, rest, value)

    def _takes(self, found: Definition, name: str) -> bool:
        takes = signature(self.sources, found) if found.node else Signature()
        return not takes.closed or name in takes.arguments or name in _SPEC

    def _spec(self, current: Any, given: Mapping[str, Any], kind: ExpectedType, key: str) -> Any:
        """A class and its arguments; of ``current``, those arguments stay that the class takes."""
        if wrong := [name for name in given if not isinstance(name, str)]:
            raise UsageError(invalid_key_type(key, wrong[0]))
        before = current if _is_spec(current) else None
        path = given.get("class_path", before["class_path"] if before else None)
        if not isinstance(path, str):
            if "class_path" in given:
                raise UsageError(wrong_value(f"{key}.class_path", path, ["the import path of a class"]))
            return {**(current if isinstance(current, Mapping) else {}), **given}
        if "class_path" in given:
            path = self._whole_path(path, kind, key)
            if beside := [name for name in given if name.partition(".")[0] not in _SPEC and name != "$schema"]:
                raise UsageError(f"{key}.{beside[0]}: arguments of {path} go into init_args, beside class_path.")
        takes = self._signature(path, key)
        arguments = before["init_args"] if before else {}
        if before and before["class_path"] != path and takes.closed:
            arguments = {name: value for name, value in arguments.items() if name in takes.arguments}
        spec = {**(before or {}), "class_path": path, "init_args": arguments}
        for name, value in given.items():
            if name not in ("class_path", "$schema"):
                spec = self._argument(spec, name.split("."), value, kind, key)
        return spec

    def _argument(self, spec: dict[str, Any], rest: Sequence[str], value: Any, kind: ExpectedType, key: str) -> Any:
        """``spec`` with another value for one of its arguments."""
        name, *more = rest
        if name == "class_path" and not more:
            return self._spec(spec, {"class_path": value}, kind, key)
        if name == "dict_kwargs":
            return {**spec, name: _nested(spec.get(name), more, value) if more else parse_collection(value)}
        if name == "init_args":
            if more:
                return self._argument(spec, more, value, kind, key)
            arguments = self.mapping(value)
            if arguments is None:
                raise UsageError(expected_mapping(f"{key}.init_args", value))
            for inner, item in arguments.items():
                spec = self._argument(spec, str(inner).split("."), item, kind, key)
            return spec
        add, name = name.endswith("+") and not more, name.rstrip("+")
        takes, owner = self._signature(spec["class_path"], key), spec["class_path"]
        argument, inner_key = takes.arguments.get(name), f"{key}.{name}"
        if argument is None and takes.closed:
            raise UsageError(unknown_key(".".join([key, *rest]), value, [f"{key}.{n}" for n in takes.arguments], owner))
        wanted = expected_type(self.sources, argument) if argument else ANYTHING
        if isinstance(value, str) and not more and argument:
            if parse_scalar(value) is None and "str" not in wanted.simple:
                value = None  # jsonargparse lets any argument of a class be null
            elif argument.module.name == "lockstep.models.classifier" and name == "network":
                wanted = self._network(value, wanted, inner_key)
        current = spec["init_args"].get(name)
        made = self.append(current, wanted, value, inner_key) if add else self.put(current, wanted, more, value, inner_key)
        return {**spec, "init_args": {**spec["init_args"], name: made}}

    def _network(self, value: str, wanted: ExpectedType, key: str) -> ExpectedType:
        """What the shared classifier takes: not any text, as its annotation says, but an import path or a torchvision model."""
        if "." in value:
            return replace(wanted, simple=())
        if value.isidentifier():
            try:
                self.sources.find(f"torchvision.models.{value}")
            except NotDefined as missing:
                if missing.near is not None:
                    names = function_names(self.sources, "torchvision.models")
                    raise UsageError(
                        f"{key}: torchvision has no classification model {value!r}{did_you_mean(value, names)}"
                    ) from None
            except Undecidable:
                pass
        return wanted

    def _whole_path(self, name: str, kind: ExpectedType, key: str) -> str:
        """The import path of a class that may be named by its last part alone, as jsonargparse lets imported ones be."""
        if "." in name:
            return name
        valid: list[str] = []
        if any(found.path.startswith(_CALLBACKS) for found in kind.classes):
            try:
                self.sources.find(f"{_CALLBACKS}.{name}")
                return f"{_CALLBACKS}.{name}"
            except NotDefined as missing:
                valid = [path.rpartition(".")[2] for path in missing.near or []]
            except Undecidable:
                pass
        else:
            valid = SHARED_CLASSES.get(key, [])
        if valid:
            self._doubts.append((key, name, valid))
        return name

    def _signature(self, path: str, key: str) -> Signature:
        if path not in self._signatures:
            self._signatures[path] = self._look_up(path, key)
        return self._signatures[path]

    def _look_up(self, path: str, key: str) -> Signature:
        if not re.fullmatch(r"\w+(\.\w+)+", path) or path.endswith((".yaml", ".yml", ".json")):
            return Signature()
        try:
            found = self.sources.find(path)
            if key in BASES and found.node is not None:
                self._check_base_class(found, path, key)
            return signature(self.sources, found)
        except Undecidable:
            return Signature()
        except NotDefined as missing:
            if missing.near is None:
                raise UsageError(missing_module(key, path, f"No module named {missing.module!r}")) from None
            raise UsageError(missing_class(key, path, missing.near)) from None

    def _check_base_class(self, found: Definition, path: str, key: str) -> None:
        base = BASES[key].path.rpartition(".")[2]
        try:
            if all(node.name != base for node, _ in class_hierarchy(self.sources, found)):
                raise UsageError(wrong_base_class(key, path, base))
        except Undecidable:
            pass

    def check_exists(self, path: str, key: str) -> None:
        """Raise about the import path of a class that certainly is not there."""
        self._signature(path, key)

    def check_ambiguous_names(self) -> None:
        """Raise about the first class named by its last part that certainly no module of this run defines."""
        named = [path for path in self._signatures if "." in path]
        if any(path.partition(".")[0] not in _FAMILIAR for path in named):
            return  # one's own modules may import anything
        for key, name, valid in self._doubts:
            near = [name for path in named for name in classes_near(self.sources, path)]
            own = [path.rpartition(".")[2] for path in classes_below(self.sources, "lockstep")]
            if name not in near and (key in BASES or name not in own):
                raise UsageError(unknown_class_name(key, name, valid))

    def check_complete(self, value: Any, kind: ExpectedType, key: str, linked: str = "") -> None:
        """Raise about the first argument that a class of ``value`` needs and does not have; ``linked`` is set elsewhere."""
        if isinstance(value, list) and kind.items:
            for item in value:
                self.check_complete(item, kind.items, key)
        if not kind.classes or not _is_spec(value):
            return
        for name, argument in self._signature(value["class_path"], key).arguments.items():
            inner, wanted = f"{key}.{name}", expected_type(self.sources, argument)
            if name in value["init_args"]:
                self.check_complete(value["init_args"][name], wanted, inner)
            elif (
                argument.default is None
                and not wanted.anything
                and "null" not in wanted.simple
                and inner != linked
                and name not in value.get("dict_kwargs", {})
            ):
                raise UsageError(missing_key(inner, value["class_path"]))


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_path"), str) and isinstance(value.get("init_args"), dict)


def _nested(current: Any, rest: Sequence[str], value: Any) -> dict[str, Any]:
    name, *more = rest
    store = dict(current) if isinstance(current, Mapping) else {}
    return {**store, name: _nested(store.get(name), more, value) if more else parse_collection(value)}
