"""Resolve an import path, through modules on disk and their imports, to the statement that defines a class."""

import ast
import builtins
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from lockstep.compat.pytorch_lightning import SAME_PACKAGES
from lockstep.config.validation.source import Binding, Imported, ModuleSource, Undecidable

_OUTSIDE = {*sys.stdlib_module_names, "typing_extensions"}
"""Packages whose sources are not read, because validation needs only their names."""


class NotDefined(Exception):
    """The module, or the name in it, certainly does not exist.

    Attributes:
        classes: Import paths of the classes in the module; None if the module does not exist.
    """

    def __init__(self, module: str, classes: Sequence[str] | None = None) -> None:
        super().__init__(module)
        self.module, self.classes = module, classes


class Definition(NamedTuple):
    """A class, function, assignment or module that an import path leads to.

    Attributes:
        path: Import path in the module that defines it.
        module: The defining module, or the module itself; None if its source is not read.
        node: The defining statement; None for a module, or if the source is not read.
    """

    path: str
    module: ModuleSource | None = None
    node: ast.stmt | None = None


class SourceIndex:
    """All importable modules by name. Each source is read once.

    Args:
        folders: Folders to search before ``sys.path``.
        elsewhere: Whether the run uses another Python, which may have packages that this one lacks.
    """

    def __init__(self, folders: Iterable[Path] = (), elsewhere: bool = False) -> None:
        self._folders, self.elsewhere = list(folders), elsewhere
        self._modules: dict[str, ModuleSource | None] = {}

    def find(self, path: str) -> Definition:
        """Find the definition of an import path such as ``package.module.Class``.

        Raises:
            NotDefined: It certainly does not exist.
            Undecidable: It may exist.
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
        for name in parts[1:]:  # a nested class
            body = found.node.body if isinstance(found.node, ast.ClassDef) else []
            inside = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
            if len(inside) != 1:
                raise Undecidable
            found = Definition(f"{found.path}.{name}", found.module, inside[0])
        return found

    def module(self, name: str) -> ModuleSource:
        """Find a module by its import path.

        Raises:
            NotDefined: It does not exist.
            Undecidable: It is not written in Python.
        """
        name = SAME_PACKAGES.get(name, name)
        parent, _, last = name.rpartition(".")
        if not parent and name not in self._modules:
            self._modules[name] = self._top_level(name)
        found = self.submodule(self.module(parent), last) if parent else self._modules[name]
        if found is None:
            raise NotDefined(name)
        return found

    def submodule(self, module: ModuleSource, name: str) -> ModuleSource | None:
        """Find a module of a package; None if it does not exist."""
        path = f"{module.name}.{name}"
        if path not in self._modules:
            self._modules[path] = None if module.folder is None else _read_module(path, module.folder / name)
        return self._modules[path]

    def _top_level(self, name: str) -> ModuleSource | None:
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
        # A namespace package: folders without an __init__.py, possibly several.
        portions = {found.folder for found in near if found.folder}
        portions |= {Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])}
        if len({folder.resolve() for folder in portions}) > 1 or (not portions and self.elsewhere):
            raise Undecidable
        return ModuleSource(name, "", portions.pop()) if portions else None

    def member(self, module: ModuleSource, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Definition:
        """Find the definition of a name in a module, following its imports.

        Raises:
            NotDefined: The module certainly does not have the name.
            Undecidable: It may have the name.
        """
        if (module.name, name) in seen:
            raise Undecidable
        seen |= {(module.name, name)}
        bindings = module.bindings(name)
        if len(bindings) > 1:
            raise Undecidable
        if bindings:
            return self._follow(module, name, bindings[0], seen)
        for star in module.stars:
            try:
                return self.member(self.module(star), name, seen)
            except NotDefined as missing:
                if missing.classes is None:
                    raise Undecidable from None
        if module.dynamic or self.submodule(module, name) is not None or module.mentions(name):
            raise Undecidable
        classes = [*module.classes, *(other for star in module.stars for other in self.module(star).classes)]
        raise NotDefined(module.name, [f"{module.name}.{other}" for other in classes])

    def _assigned_elsewhere(self, module: ModuleSource, name: str) -> bool:
        """Whether another module of the package may set the name on it, as Lightning does for deprecated names."""
        package = module.name.partition(".")[0]
        top = self.module(package).folder
        if top is None or not (top / "__init__.py").exists() or package == "lockstep":
            return False
        word = re.escape(name)
        named = rf"""["']{word}["']"""
        sets = re.compile(rf"\bsetattr\([\s\S]*{named}|{named}[\s\S]*\bsetattr\(|^\S+\.{word}\s*=".encode(), re.MULTILINE)
        texts = (file.read_bytes() for file in top.rglob("*.py"))
        return any(name.encode() in text and sets.search(text) for text in texts)

    def _follow(self, module: ModuleSource, name: str, binding: Binding, seen: frozenset[tuple[str, str]]) -> Definition:
        if isinstance(binding, ast.Assign | ast.AnnAssign) and isinstance(binding.value, ast.Name | ast.Attribute):
            return self.resolve(module, binding.value, seen)
        if not isinstance(binding, Imported):
            return Definition(f"{module.name}.{name}", module, binding)
        if binding.module.partition(".")[0] in _OUTSIDE:
            return Definition(f"{binding.module}.{binding.name}" if binding.name else binding.module)
        try:
            source = self.module(binding.module)
            if not binding.name:
                return Definition(source.name, source)
            if (inner := self.submodule(source, binding.name)) is not None:
                return Definition(inner.name, inner)
            return self.member(source, binding.name, seen)
        except NotDefined:  # the import fails, or is inside a try
            raise Undecidable from None

    def resolve(self, module: ModuleSource, node: ast.expr, seen: frozenset[tuple[str, str]] = frozenset()) -> Definition:
        """Find the definition of a name or dotted name, such as ``nn.Module``, in a module.

        Raises:
            Undecidable: It may have several definitions, or none.
        """
        try:
            if isinstance(node, ast.Name):
                if hasattr(builtins, node.id) and module.is_builtin(node.id):
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


_module_source = lru_cache(maxsize=256)(ModuleSource)
"""The text is part of the key: a module is scanned again only if it has changed. A local run validates its config twice."""


def _read_module(name: str, path: Path) -> ModuleSource | None:
    """Read the module or package at ``path``, a path without a suffix; None if it does not exist."""
    init, file = path / "__init__.py", path.parent / f"{path.name}.py"
    try:
        if init.is_file():
            return _module_source(name, init.read_text(), path, file=init)
        if file.is_file():
            return _module_source(name, file.read_text(), stubbed=file.with_suffix(".pyi").is_file(), file=file)
    except (OSError, UnicodeDecodeError):
        raise Undecidable from None
    if path.parent.is_dir() and any(
        name.startswith(f"{path.name}.") and name.endswith((".so", ".pyd", ".pyc")) for name in os.listdir(path.parent)
    ):
        raise Undecidable  # compiled
    return ModuleSource(name, "", path) if path.is_dir() else None
