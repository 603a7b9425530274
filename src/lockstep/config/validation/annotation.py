"""Check values against simple type annotations as jsonargparse does; other annotations accept anything."""

import ast
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lockstep.config import load_yaml
from lockstep.config.validation.lookup import Definition, SourceIndex
from lockstep.config.validation.signature import Argument, class_hierarchy
from lockstep.config.validation.source import ModuleSource, Undecidable

_SIMPLE = {
    "pathlib.Path": "Path",
    "os.PathLike": "Path",
    "datetime.timedelta": "str",
    **{f"builtins.{name}": name for name in ("int", "float", "bool", "str")},
}

_LISTS, _MAPPINGS = (
    {f"{module}.{name}" for module in ("builtins", "typing", "collections.abc") for name in names}
    for names in (("list", "List", "Sequence", "MutableSequence", "Iterable"), ("dict", "Dict", "Mapping", "MutableMapping"))
)

INVALID = object()
"""Returned by ``ExpectedType.accept`` for a value that is certainly not valid."""


class ExpectedType(NamedTuple):
    """The values that an annotation accepts: a union of kinds.

    Attributes:
        simple: Any of int, float, bool, str, Path and null.
        choices: Values of a ``Literal``.
        classes: Classes whose instances are accepted; a config gives them by class path.
        items: The values of a list; None if a list is not accepted.
        mappings: Whether a mapping is accepted.
        anything: Whether any value may be accepted.
        default: The default, which is accepted even if the annotation excludes it.
    """

    simple: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    classes: tuple[Definition, ...] = ()
    items: "ExpectedType | None" = None
    mappings: bool = False
    anything: bool = False
    default: Any = INVALID

    def __or__(self, other: "ExpectedType") -> "ExpectedType":
        items = self.items | other.items if self.items and other.items else self.items or other.items
        return ExpectedType(
            self.simple + other.simple,
            self.choices + other.choices,
            self.classes + other.classes,
            items,
            self.mappings or other.mappings,
            self.anything or other.anything,
        )

    @property
    def names(self) -> list[str]:
        """Names of the kinds, for messages."""
        names = [name for name in self.simple if name != "null"]
        names += [f"one of {', '.join(map(repr, self.choices))}"] if self.choices else []
        names += [found.path.rpartition(".")[2] for found in self.classes]
        names += ["list"] if self.items else []
        names += ["dict"] if self.mappings else []
        return [*dict.fromkeys(names), *(["null"] if "null" in self.simple else [])]

    def accept(self, value: Any) -> Any:
        """Convert a value that is not a list, a mapping or a class; return INVALID if it is not accepted."""
        if type(value) is type(self.default) and value == self.default:
            return value
        for candidate in [parse_scalar(value), value] if isinstance(value, str) else [value]:
            if candidate in self.choices:
                return candidate
            match candidate:
                case None if "null" in self.simple:
                    return None
                case bool():
                    if "bool" in self.simple:
                        return candidate
                case int() if "int" in self.simple:
                    return candidate
                case int() | float() if "float" in self.simple:
                    return float(candidate)
                case str():
                    if "str" in self.simple:
                        return candidate
                    if "Path" in self.simple:
                        return Path(candidate)
                case None | int() | float() | Mapping() | list():
                    pass
                case _:  # types that only YAML has, such as a set
                    return candidate
        return INVALID


ANYTHING = ExpectedType(anything=True)


def expected_type(sources: SourceIndex, argument: Argument) -> ExpectedType:
    """Derive the accepted values of an argument from its annotation and default."""
    if argument.annotation is None or argument.module.defines_types:
        return ANYTHING
    try:
        found = _from_annotation(sources, argument.module, argument.annotation)
    except RecursionError:  # a recursive type
        return ANYTHING
    if argument.default is None:
        return found
    default = _constant_value(sources, argument.module, argument.default)
    if default is None and "null" not in found.simple:
        found = found._replace(simple=(*found.simple, "null"))
    # A computed default may be a string that the annotation does not allow; jsonargparse accepts it nevertheless.
    computed = default is INVALID and not isinstance(argument.default, ast.Call)
    return found._replace(default=default, anything=found.anything or (computed and not (found.classes or found.items)))


def _constant_value(sources: SourceIndex, module: ModuleSource, node: ast.expr) -> Any:
    """The value of a constant expression, else INVALID."""
    try:
        if isinstance(node, ast.Name | ast.Attribute):
            found = sources.resolve(module, node)
            if isinstance(found.node, ast.Assign | ast.AnnAssign) and found.node.value is not None:
                node = found.node.value
        return ast.literal_eval(node)
    except (ValueError, TypeError, Undecidable):
        return INVALID


def _from_annotation(sources: SourceIndex, module: ModuleSource, node: ast.expr) -> ExpectedType:
    generic, parts = node, []
    match node:
        case ast.Constant(value=None):
            return ExpectedType(simple=("null",))
        case ast.Constant(value=str(text)):
            try:
                return _from_annotation(sources, module, ast.parse(text, mode="eval").body)
            except SyntaxError:
                return ANYTHING
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _from_annotation(sources, module, left) | _from_annotation(sources, module, right)
        case ast.Subscript(value=generic, slice=inner):
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    try:
        found = sources.resolve(module, generic)
    except Undecidable:
        return ANYTHING
    path = found.path.replace("typing_extensions.", "typing.")
    if path in _MAPPINGS:
        return ExpectedType(mappings=True)
    if path in _LISTS and len(parts) < 2:
        return ExpectedType(items=_from_annotation(sources, module, parts[0]) if parts else ANYTHING)
    if parts:
        return _special_form(sources, module, path, parts)
    if path in _SIMPLE:
        return ExpectedType(simple=(_SIMPLE[path],))
    if found.module is not None and isinstance(found.node, ast.Assign | ast.AnnAssign) and found.node.value is not None:
        return _from_annotation(sources, found.module, found.node.value)
    try:
        # A config can give an enum, a dataclass, a NewType … in other ways than by class path.
        is_plain = not any(cls.decorator_list for cls, _ in class_hierarchy(sources, found))
    except Undecidable:
        return ANYTHING
    return ExpectedType(classes=(found,)) if is_plain else ANYTHING


def _special_form(sources: SourceIndex, module: ModuleSource, path: str, parts: list[ast.expr]) -> ExpectedType:
    if path == "typing.Literal":
        try:
            choices = tuple(ast.literal_eval(part) for part in parts)
        except ValueError:
            return ANYTHING
        return ExpectedType(choices=tuple(c for c in choices if c is not None), simple=("null",) if None in choices else ())
    if path in ("typing.Optional", "typing.Union"):
        found = ExpectedType(simple=("null",) if path == "typing.Optional" else ())
        for part in parts:
            found |= _from_annotation(sources, module, part)
        return found
    return ANYTHING


def parse_scalar(text: str) -> Any:
    """Convert a string to the number, boolean or null that it contains; return other strings unchanged."""
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, bool | int | float) or (value is None and text.strip()):
        return value
    if re.search(r"\d", text):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(text)
    return text
