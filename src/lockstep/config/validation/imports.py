"""Find errors that importing a user's module would certainly raise: wrong syntax and missing packages."""

import ast
import sys

from lockstep.config.validation.lookup import NotDefined, SourceIndex
from lockstep.config.validation.source import Undecidable, parse
from lockstep.core import UsageError


def check_imports(sources: SourceIndex, path: str, key: str) -> None:
    """Raise UsageError with file and line if the module of the class ``path``, the value of ``key``, cannot be imported."""
    first, *parts = path.split(".")
    if sources.elsewhere or first in (*sys.stdlib_module_names, "lockstep"):
        return
    try:
        module = sources.module(first)
        while parts and (inner := sources.submodule(module, parts.pop(0))) is not None:
            module = inner
    except (NotDefined, Undecidable):
        return
    if module.file is None or "site-packages" in module.file.parts:
        return
    try:
        tree = parse(module.text)
    except SyntaxError as error:
        place = f"{module.file}, line {error.lineno}"
        raise UsageError(f"{key}: {path} cannot be imported: SyntaxError: {error.msg} ({place}).") from None
    for node in tree.body if "sys.path" not in module.text else []:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in (name.partition(".")[0] for name in names):
            try:
                _ = name in sys.stdlib_module_names or sources.module(name)
            except Undecidable:
                continue
            except NotDefined:
                raise UsageError(
                    f"{key}: {path} cannot be imported: ModuleNotFoundError: No module named {name!r} "
                    f"({module.file}, line {node.lineno}); install it in the environment of the run."
                ) from None
