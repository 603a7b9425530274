"""Import ``pytorch_lightning`` as ``lightning.pytorch``: the packages contain separate copies of the same classes."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SAME_PACKAGES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}
"""Packages that contain copies of classes, and the packages that replace them."""


class _SamePackage(MetaPathFinder, Loader):
    """Finds the modules of a package in the one that replaces it, so that both have the same classes."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in SAME_PACKAGES else None

    def exec_module(self, module: ModuleType) -> None:
        package, _, rest = module.__name__.partition(".")
        sys.modules[module.__name__] = importlib.import_module(f"{SAME_PACKAGES[package]}.{rest}".rstrip("."))


def import_as_lightning() -> None:
    """Let modules written for ``pytorch_lightning`` use Lightning's classes; call this before they are imported."""
    if not any(isinstance(finder, _SamePackage) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SamePackage())
