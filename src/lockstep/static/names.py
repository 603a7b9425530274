"""Names that a module or a package offers, to suggest them or to know what may be meant by one."""

import re

from lockstep.static.lookup import Missing, Sources
from lockstep.static.signature import lineage
from lockstep.static.source import CannotTell


def classes_below(sources: Sources, package: str) -> list[str]:
    """Import paths of the classes that the modules of a package define."""
    top = sources.module(package)
    names = sorted(file.stem for file in top.folder.glob("*.py")) if top.folder else []
    modules = [sources.submodule(top, name) for name in names if name != "__init__"]
    return [f"{module.name}.{name}" for module in modules if module for name in module.classes]


def functions(sources: Sources, package: str) -> list[str]:
    """Names of the functions that a package has from its modules, by ``from module import *``."""
    texts = [sources.module(star).text for star in sources.module(package).stars]
    return [name for text in texts for name in re.findall(r"^def ([a-z]\w*)", text, re.MULTILINE)]


def classes_near(sources: Sources, path: str) -> list[str]:
    """Names of the classes in the modules of a class and of those above it: they are imported with it."""
    try:
        return [name for _, module in lineage(sources, sources.find(path)) for name in module.classes]
    except (CannotTell, Missing):
        return []
