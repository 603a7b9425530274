"""Merge values into class arguments as jsonargparse does, and refuse those that a class does not accept."""

import ast
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lockstep.config import SHARED_CLASSES, messages, parse_collection, read_config_file, typed_text
from lockstep.config.validation.annotation import ANYTHING, INVALID, ExpectedType, expected_type, parse_scalar
from lockstep.config.validation.imports import check_imports
from lockstep.config.validation.lookup import Definition, NotDefined, SourceIndex
from lockstep.config.validation.signature import Signature, class_hierarchy, signature
from lockstep.config.validation.source import Undecidable
from lockstep.core import UsageError, did_you_mean

BASES = {"model": Definition("lightning.pytorch.LightningModule"), "data": Definition("lightning.pytorch.LightningDataModule")}
"""Keys whose values are classes, and the required base classes."""

OPTIONAL_CLASSES = {
    "optimizer": Definition("torch.optim.Optimizer"),
    "lr_scheduler": Definition("torch.optim.lr_scheduler.LRScheduler"),
}
"""Further keys whose values are classes, instantiated as LightningCLI does."""

_SPEC_KEYS = {"class_path", "init_args", "dict_kwargs"}

_CALLBACKS = "lightning.pytorch.callbacks"

_KNOWN_PACKAGES = {"lockstep", "lightning", "torch", "torchvision", "torchmetrics"}
"""Packages whose modules do not import user code."""


class ValueMerger:
    """Merge the values of a config with the arguments of its classes.

    Attributes:
        folder: Folder that a relative path in a value starts from.
        file: The config file that a value comes from, with the folder that its path starts from; None for a flag.
    """

    file: tuple[str, Path] | None = None

    def __init__(self, sources: SourceIndex) -> None:
        self._sources, self.folder = sources, Path()
        self._signatures: dict[str, Signature] = {}
        self._unknown_short_names: list[tuple[str, str, list[str]]] = []

    def merge(self, current: Any, expected: ExpectedType, rest: Sequence[str], value: Any, key: str) -> Any:
        """Return ``current`` after setting it, or one of its nested arguments, to ``value``.

        Args:
            rest: Path to a nested argument: the argument of the class, the argument of that argument's class, and so on.
            value: The text of a flag, or the value in a config file.
            key: Key of ``current``, for messages.

        Raises:
            UsageError: The value is certainly wrong.
        """
        if rest:
            return self._merge_nested(current, expected, rest, value, key)
        if value is None:
            return None
        plain = parse_collection(value)
        if expected.anything or (expected.mappings and self.mapping(value) is not None):
            return plain
        if isinstance(plain, Mapping) and expected.classes:
            return self._merge_spec(current, plain, expected, key)
        if isinstance(plain, list) and expected.items:
            before = current if isinstance(current, list) and len(current) == len(plain) else [None] * len(plain)
            return [self.merge(old, expected.items, [], item, key) for old, item in zip(before, plain, strict=True)]
        for candidate in (plain, value):
            if (accepted := expected.accept(candidate)) is not INVALID:
                return accepted
        if isinstance(value, str) and expected.classes:
            return self._merge_spec(current, self.mapping(value) or {"class_path": value}, expected, key)
        if isinstance(value, str) and expected.items and not expected.items.simple:
            return value  # possibly a file name
        choices = [choice for choice in expected.choices if isinstance(choice, str)]
        typed = None
        if self.file is not None and not isinstance(value, str):
            typed = typed_text(*self.file, key.rpartition(".")[2], value)
        raise UsageError(messages.wrong_value(key, value, expected.names, choices, typed))

    def append(self, current: Any, expected: ExpectedType, value: Any, key: str) -> Any:
        """Return the list ``current`` with one or several items appended."""
        if expected.items is None and not expected.anything:
            raise UsageError(messages.unknown_key(f"{key}+", value, [key]))
        plain = parse_collection(value)
        before = current if isinstance(current, list) else [] if current is None else [current]
        items = plain if isinstance(plain, list) else [value]
        return [*before, *(self.merge(None, expected.items or expected, [], item, key) for item in items)]

    def mapping(self, value: Any) -> dict[Any, Any] | None:
        """Return the mapping that is given itself, as YAML or as a file name; None for any other value."""
        plain = parse_collection(value)
        try:
            if isinstance(plain, str) and (self.folder / plain).is_file():
                return read_config_file(plain, self.folder)
        except (UsageError, OSError):
            return None
        return plain if isinstance(plain, dict) else None

    def _merge_nested(self, current: Any, expected: ExpectedType, rest: Sequence[str], value: Any, key: str) -> Any:
        if isinstance(current, list) and current:
            return [*current[:-1], self._merge_nested(current[-1], expected, rest, value, key)]
        inner = [expected, *([expected.items] if expected.items else [])]
        if not any(item.classes or item.anything or item.mappings for item in inner):
            raise UsageError(messages.unknown_key(".".join([key, *rest]), value, [key]))
        classes = [item for item in inner if item.classes]
        if classes and not expected.anything and not expected.mappings:
            if isinstance(current, str):
                current = self._merge_spec(None, {"class_path": current}, classes[0], key)
            if _is_spec(current):
                return self._set_argument(current, rest, value, classes[0], key)
            is_unset = current is None and expected.default is None
            if is_unset and not any(self._accepts(cls, rest[0]) for cls in expected.classes):
                raise UsageError(messages.class_not_set(key, ".".join([key, *rest]), value))
        return _set_nested(current, rest, value)

    def _accepts(self, cls: Definition, name: str) -> bool:
        parameters = signature(self._sources, cls) if cls.node else Signature()
        return not parameters.closed or name in parameters.arguments or name in _SPEC_KEYS

    def _merge_spec(self, current: Any, given: Mapping[str, Any], expected: ExpectedType, key: str) -> Any:
        """Merge a class and its arguments into ``current``; a new class keeps the old arguments that it accepts."""
        if wrong := [name for name in given if not isinstance(name, str)]:
            raise UsageError(messages.invalid_key_type(key, wrong[0]))
        before = current if _is_spec(current) else None
        path = given.get("class_path", before["class_path"] if before else None)
        if not isinstance(path, str):
            if "class_path" in given:
                raise UsageError(messages.wrong_value(f"{key}.class_path", path, ["the import path of a class"]))
            return {**(current if isinstance(current, Mapping) else {}), **given}
        if "class_path" in given:
            path = self._full_path(path, expected, key)
            if beside := [name for name in given if name.partition(".")[0] not in _SPEC_KEYS and name != "$schema"]:
                raise UsageError(f"{key}.{beside[0]}: arguments of {path} belong in init_args; move it there.")
        parameters = self.class_signature(path, key)
        arguments = before["init_args"] if before else {}
        if before and before["class_path"] != path and parameters.closed:
            arguments = {name: value for name, value in arguments.items() if name in parameters.arguments}
        spec = {**(before or {}), "class_path": path, "init_args": arguments}
        for name, value in given.items():
            if name not in ("class_path", "$schema"):
                spec = self._set_argument(spec, name.split("."), value, expected, key)
        return spec

    def _set_argument(self, spec: dict[str, Any], rest: Sequence[str], value: Any, expected: ExpectedType, key: str) -> Any:
        """Return ``spec`` with another value for one of its arguments."""
        name, *more = rest
        if name == "class_path" and not more:
            return self._merge_spec(spec, {"class_path": value}, expected, key)
        if name == "dict_kwargs":
            return {**spec, name: _set_nested(spec.get(name), more, value) if more else parse_collection(value)}
        if name == "init_args":
            if more:
                return self._set_argument(spec, more, value, expected, key)
            if (arguments := self.mapping(value)) is None:
                raise UsageError(messages.expected_mapping(f"{key}.init_args", value))
            for argument_name, item in arguments.items():
                spec = self._set_argument(spec, str(argument_name).split("."), item, expected, key)
            return spec
        append, name = name.endswith("+") and not more, name.rstrip("+")
        parameters, owner = self.class_signature(spec["class_path"], key), spec["class_path"]
        argument, inner_key = parameters.arguments.get(name), f"{key}.{name}"
        if argument is None and parameters.closed:
            valid = [f"{key}.{other}" for other in parameters.arguments]
            raise UsageError(messages.unknown_key(".".join([key, *rest]), value, valid, owner))
        inner = expected_type(self._sources, argument) if argument else ANYTHING
        if isinstance(value, str) and not more and argument:
            if parse_scalar(value) is None and "str" not in inner.simple:
                value = None  # jsonargparse accepts null for any argument of a class
            elif argument.module.name == "lockstep.models.classifier" and name == "network":
                inner = self._expected_network(value, inner, inner_key)
        current = spec["init_args"].get(name)
        merged = self.append(current, inner, value, inner_key) if append else self.merge(current, inner, more, value, inner_key)
        return {**spec, "init_args": {**spec["init_args"], name: merged}}

    def _expected_network(self, value: str, expected: ExpectedType, key: str) -> ExpectedType:
        """Narrow the annotation of ``Classifier.network``: an import path or a torchvision model, not any text."""
        if "." in value:
            return expected._replace(simple=())
        if value.isidentifier():
            try:
                self._sources.find(f"torchvision.models.{value}")
            except NotDefined as missing:
                if missing.classes is not None:
                    texts = [self._sources.module(star).text for star in self._sources.module("torchvision.models").stars]
                    names = re.findall(r"^def ([a-z]\w*)", "\n".join(texts), re.MULTILINE)
                    raise UsageError(
                        f"{key}: torchvision has no classification model {value!r}{did_you_mean(value, names)}"
                    ) from None
            except Undecidable:
                pass
        return expected

    def _full_path(self, name: str, expected: ExpectedType, key: str) -> str:
        """Complete a class name without its module, which jsonargparse accepts for imported classes."""
        if "." in name:
            return name
        valid = SHARED_CLASSES.get(key, [])
        if any(cls.path.startswith(_CALLBACKS) for cls in expected.classes):
            try:
                self._sources.find(f"{_CALLBACKS}.{name}")
                return f"{_CALLBACKS}.{name}"
            except NotDefined as missing:
                valid = [path.rpartition(".")[2] for path in missing.classes or []]
            except Undecidable:
                pass
        if valid:
            self._unknown_short_names.append((key, name, valid))
        return name

    def class_signature(self, path: str, key: str) -> Signature:
        """Return the arguments of the class at an import path; raise UsageError if it certainly does not exist."""
        if path not in self._signatures:
            self._signatures[path] = self._look_up(path, key)
        return self._signatures[path]

    def _look_up(self, path: str, key: str) -> Signature:
        if not re.fullmatch(r"\w+(\.\w+)+", path) or path.endswith((".yaml", ".yml", ".json")):
            return Signature()
        check_imports(self._sources, path, key)
        try:
            found = self._sources.find(path)
        except Undecidable:
            return Signature()
        except NotDefined as missing:
            if path.startswith("lockstep."):
                valid = missing.classes or [name for names in SHARED_CLASSES.values() for name in names]
                raise UsageError(f"{key}: {path} does not exist{did_you_mean(path, valid)}") from None
            if missing.classes is not None:
                raise UsageError(f"{key}: {path} does not exist{did_you_mean(path, missing.classes)}") from None
            raise UsageError(
                f"{key}: {path} does not exist (No module named {missing.module!r}); "
                "run from the folder that contains your module."
            ) from None
        if key in BASES and found.node is not None:
            base = BASES[key].path.rpartition(".")[2]
            with suppress(Undecidable):
                if all(node.name != base for node, _ in class_hierarchy(self._sources, found)):
                    raise UsageError(f"{key}: {path} is not a {base}.")
        return signature(self._sources, found)

    def may_define(self, spec: Any, method: str) -> bool:
        """Whether a class, or a base that is not Lightning's own, may define ``method``."""
        if not _is_spec(spec):
            return True
        try:
            return any(
                method in ast.dump(node)
                for base, module in class_hierarchy(self._sources, self._sources.find(spec["class_path"]))
                if not module.name.startswith("lightning.")
                for node in ast.walk(module.tree)  # which has all methods of ``base``
                if isinstance(node, ast.ClassDef) and node.name == base.name
            )
        except (Undecidable, NotDefined):
            return True

    def check_short_names(self) -> None:
        """Raise UsageError for a class name without its module that no module of this run defines."""
        named = [path for path in self._signatures if "." in path]
        if any(path.partition(".")[0] not in _KNOWN_PACKAGES for path in named):
            return  # user modules may import any class
        for key, name, valid in self._unknown_short_names:
            known = [] if key in BASES else self._lockstep_classes()
            if name not in [*known, *(near for path in named for near in self._classes_near(path))]:
                raise UsageError(f"{key}: unknown class {name!r}{did_you_mean(name, valid)}")

    def _lockstep_classes(self) -> list[str]:
        folder = self._sources.module("lockstep").folder
        texts = [file.read_text() for file in folder.rglob("*.py")] if folder else []
        return [name for text in texts for name in re.findall(r"^class ([a-zA-Z]\w*)", text, re.MULTILINE)]

    def _classes_near(self, path: str) -> list[str]:
        """Names of the classes in the modules of a class and its bases; importing the class imports them too."""
        try:
            return [name for _, module in class_hierarchy(self._sources, self._sources.find(path)) for name in module.classes]
        except (Undecidable, NotDefined):
            return []

    def check_required(self, value: Any, expected: ExpectedType, key: str, linked: str = "") -> None:
        """Raise UsageError if a class in ``value`` lacks a required argument; another key sets the key ``linked``."""
        if isinstance(value, list) and expected.items:
            for item in value:
                self.check_required(item, expected.items, key)
        if not expected.classes or not _is_spec(value):
            return
        for name, argument in self.class_signature(value["class_path"], key).arguments.items():
            inner_key, inner = f"{key}.{name}", expected_type(self._sources, argument)
            if name in value["init_args"]:
                self.check_required(value["init_args"][name], inner, inner_key)
            elif (
                argument.default is None
                and not inner.anything
                and "null" not in inner.simple
                and inner_key != linked
                and name not in value.get("dict_kwargs", {})
            ):
                raise UsageError(messages.missing_key(inner_key, value["class_path"]))


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_path"), str) and isinstance(value.get("init_args"), dict)


def _set_nested(current: Any, rest: Sequence[str], value: Any) -> dict[str, Any]:
    name, *more = rest
    mapping = dict(current) if isinstance(current, Mapping) else {}
    return {**mapping, name: _set_nested(mapping.get(name), more, value) if more else parse_collection(value)}
