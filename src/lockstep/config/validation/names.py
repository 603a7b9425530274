"""Names that modules and packages define, for suggestions and to resolve short names."""

import re

from lockstep.config.validation.lookup import NotDefined, SourceIndex
from lockstep.config.validation.signature import class_hierarchy
from lockstep.config.validation.source import Undecidable


def classes_below(sources: SourceIndex, package: str) -> list[str]:
    """Import paths of the classes that the modules of a package define."""
    top = sources.module(package)
    files = sorted(file.relative_to(top.folder).with_suffix("") for file in top.folder.rglob("*.py")) if top.folder else []
    modules = [sources.module(".".join([package, *file.parts])) for file in files if file.name != "__init__"]
    return [f"{module.name}.{name}" for module in modules for name in module.classes]


def function_names(sources: SourceIndex, package: str) -> list[str]:
    """Names of the functions that a package imports with ``from module import *``."""
    texts = [sources.module(star).text for star in sources.module(package).stars]
    return [name for text in texts for name in re.findall(r"^def ([a-z]\w*)", text, re.MULTILINE)]


def classes_near(sources: SourceIndex, path: str) -> list[str]:
    """Names of the classes in the modules of a class and its bases, which importing the class also imports."""
    try:
        return [name for _, module in class_hierarchy(sources, sources.find(path)) for name in module.classes]
    except (Undecidable, NotDefined):
        return []
