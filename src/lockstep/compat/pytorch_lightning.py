"""Import ``pytorch_lightning`` as ``lightning.pytorch``: the packages have the same classes, but copies of them."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SAME_PACKAGES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}
"""Packages that hold copies of the classes of another one, and that other one."""


class _SamePackage(MetaPathFinder, Loader):
    """Finds the modules of a package in another one, so that the classes of both are the same."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in SAME_PACKAGES else None

    def exec_module(self, module: ModuleType) -> None:
        package, _, rest = module.__name__.partition(".")
        sys.modules[module.__name__] = importlib.import_module(f"{SAME_PACKAGES[package]}.{rest}".rstrip("."))


def import_as_lightning() -> None:
    """Let modules that are written for ``pytorch_lightning`` use Lightning's classes; call it before they are imported."""
    if not any(isinstance(finder, _SamePackage) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SamePackage())
