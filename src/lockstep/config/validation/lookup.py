"""Where an import path leads: to the module on disk, and through its imports to the statement that defines a class."""

import ast
import builtins
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.config.validation.source import Binding, Imported, ModuleSource, Undecidable

_OUTSIDE = {*sys.stdlib_module_names, "typing_extensions"}
"""Packages whose sources are not read; what matters of them is known by name."""


class NotDefined(Exception):
    """There is certainly no such module, or no such name in it.

    Attributes:
        module: The module that is missing, or that lacks the name.
        near: Import paths of the classes that the module has; None where it is itself missing.
    """

    def __init__(self, module: str, near: Sequence[str] | None = None) -> None:
        super().__init__(module)
        self.module, self.near = module, near


@dataclass(frozen=True)
class Definition:
    """Where an import path leads in the end.

    Attributes:
        path: The import path of what was found, where it is defined.
        module: The module that defines it, or that it is; None for what is not read.
        node: The statement that defines it; None for a module, and for what is not read.
    """

    path: str
    module: ModuleSource | None = None
    node: ast.stmt | None = None


class SourceIndex:
    """All modules that could be imported, by name. Each is read once.

    Args:
        folders: Where modules are looked for before ``sys.path``.
        elsewhere: Whether the run has another Python, which may have packages that are not here.
    """

    def __init__(self, folders: Iterable[Path] = (), elsewhere: bool = False) -> None:
        self._folders, self._elsewhere = [Path(folder) for folder in folders], elsewhere
        self._modules: dict[str, ModuleSource | None] = {}

    def find(self, path: str) -> Definition:
        """What is defined at an import path such as ``package.module.Class``.

        Raises:
            Missing: There is certainly nothing.
            CannotTell: There may be.
        """
        first, *parts = path.split(".")
        if first in _OUTSIDE:
            return Definition(path)
        module = self.module(first)
        while len(parts) > 1 and (inner := self.submodule(module, parts[0])) is not None:
            module = inner
            del parts[0]
        try:
            found = self.member(module, parts[0])
        except NotDefined:
            if self._assigned_elsewhere(module, parts[0]):
                raise Undecidable from None
            if len(parts) > 1:
                raise NotDefined(f"{module.name}.{parts[0]}") from None
            raise
        for name in parts[1:]:  # a class in a class
            body = found.node.body if isinstance(found.node, ast.ClassDef) else []
            inside = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
            if len(inside) != 1:
                raise Undecidable
            found = Definition(f"{found.path}.{name}", found.module, inside[0])
        return found

    def module(self, name: str) -> ModuleSource:
        """The module of that name.

        Raises:
            Missing: There is none.
            CannotTell: It is not written in Python.
        """
        parent, _, last = name.rpartition(".")
        if parent:
            if (found := self.submodule(self.module(parent), last)) is None:
                raise NotDefined(name)
            return found
        if name not in self._modules:
            self._modules[name] = self._top(name)
        if (found := self._modules[name]) is None:
            raise NotDefined(name)
        return found

    def submodule(self, module: ModuleSource, name: str) -> ModuleSource | None:
        """The module of that name in a package, if there is one."""
        path = f"{module.name}.{name}"
        if path not in self._modules:
            self._modules[path] = None if module.folder is None else _read_module(path, module.folder / name)
        return self._modules[path]

    def _top(self, name: str) -> ModuleSource | None:
        near = [found for folder in self._folders if (found := _read_module(name, folder / name)) is not None]
        for found in near:
            if found.folder is None or (found.folder / "__init__.py").exists():
                return found
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            raise Undecidable from None
        if spec is not None and spec.origin is not None:
            if not spec.origin.endswith(".py"):
                raise Undecidable
            origin = Path(spec.origin)
            return _read_module(name, origin.parent if origin.name == "__init__.py" else origin.with_suffix(""))
        # Folders without an __init__.py; there may be several of one name.
        spread = {found.folder for found in near} | {
            Path(place) for place in (spec.submodule_search_locations or [] if spec else [])
        }
        if len({place.resolve() for place in spread if place}) > 1:
            raise Undecidable
        if not spread and self._elsewhere:
            raise Undecidable
        return ModuleSource(name, "", spread.pop()) if spread else None

    def member(self, module: ModuleSource, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Definition:
        """What ``name`` is in a module: the class, function or assignment, wherever it comes from.

        Raises:
            Missing: The module certainly has no such name.
            CannotTell: It may have.
        """
        if (module.name, name) in seen:
            raise Undecidable
        seen |= {(module.name, name)}
        bound = module.bound(name)
        if len(bound) > 1:
            raise Undecidable
        if bound:
            return self._follow(module, name, bound[0], seen)
        for star in module.stars:
            try:
                return self.member(self.module(star), name, seen)
            except NotDefined as missing:
                if missing.near is None:
                    raise Undecidable from None
        if module.dynamic or self.submodule(module, name) is not None or module.mentions(name):
            raise Undecidable
        raise NotDefined(module.name, [f"{module.name}.{other}" for other in self._classes(module)])

    def _assigned_elsewhere(self, module: ModuleSource, name: str) -> bool:
        """Whether another module of the same package may give it the name, as lightning does with names of old."""
        top = self.module(module.name.partition(".")[0]).folder
        if top is None or not (top / "__init__.py").exists():
            return False
        named = rf"""["']{name}["']"""
        sets = re.compile(rf"\bsetattr\([\s\S]*{named}|{named}[\s\S]*\bsetattr\(|^\S+\.{name}\s*=".encode(), re.MULTILINE)
        texts = (file.read_bytes() for file in top.rglob("*.py"))
        return any(name.encode() in text and sets.search(text) for text in texts)

    def _classes(self, module: ModuleSource) -> list[str]:
        return [*module.classes, *(other for star in module.stars for other in self.module(star).classes)]

    def _follow(self, module: ModuleSource, name: str, bound: Binding, seen: frozenset[tuple[str, str]]) -> Definition:
        if isinstance(bound, ast.Assign | ast.AnnAssign) and isinstance(bound.value, ast.Name | ast.Attribute):
            return self.resolve(module, bound.value, seen)
        if not isinstance(bound, Imported):
            return Definition(f"{module.name}.{name}", module, bound)
        if bound.module.partition(".")[0] in _OUTSIDE:
            return Definition(f"{bound.module}.{bound.name}" if bound.name else bound.module)
        try:
            there = self.module(bound.module)
            if not bound.name:
                return Definition(there.name, there)
            if (inner := self.submodule(there, bound.name)) is not None:
                return Definition(inner.name, inner)
            return self.member(there, bound.name, seen)
        except NotDefined:  # then the import itself fails, or is in a try
            raise Undecidable from None

    def resolve(self, module: ModuleSource, node: ast.expr, seen: frozenset[tuple[str, str]] = frozenset()) -> Definition:
        """What a name or dotted name, such as ``nn.Module``, is in a module.

        Raises:
            CannotTell: Nothing certain.
        """
        try:
            if isinstance(node, ast.Name):
                if hasattr(builtins, node.id) and module.keeps(node.id):
                    return Definition(f"builtins.{node.id}")
                return self.member(module, node.id, seen)
            if isinstance(node, ast.Attribute):
                owner = self.resolve(module, node.value, seen)
                if owner.module is None:
                    return Definition(f"{owner.path}.{node.attr}")
                if owner.node is None:
                    inner = self.submodule(owner.module, node.attr)
                    return Definition(inner.name, inner) if inner else self.member(owner.module, node.attr, seen)
        except NotDefined:
            pass
        raise Undecidable


def _read_module(name: str, place: Path) -> ModuleSource | None:
    """The module at ``place``, a path without a suffix; None where there is nothing."""
    init, file = place / "__init__.py", place.parent / f"{place.name}.py"
    try:
        if init.is_file():
            return ModuleSource(name, init.read_text(), place)
        if file.is_file():
            return ModuleSource(name, file.read_text(), stubbed=file.with_suffix(".pyi").is_file())
    except (OSError, UnicodeDecodeError):
        raise Undecidable from None
    if any(other.suffix in (".so", ".pyd", ".pyc") for other in place.parent.glob(f"{place.name}.*")):
        raise Undecidable  # compiled
    return ModuleSource(name, "", place) if place.is_dir() else None
