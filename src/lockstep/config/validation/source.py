"""Find names in the source of a module. Only statements that contain a name are parsed: a large file takes a millisecond."""

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

_DYNAMIC = ("__getattr__", "globals(", "exec(", "sys.modules", "__path__")
"""Text in a module that may define names without a statement."""

_DEFINITION = re.compile(r"^(?:async )?(?:class|def) (\w+)", re.MULTILINE)


class Undecidable(Exception):
    """The source does not decide the question; only an import would."""


class Imported(NamedTuple):
    """A name from another module: ``from module import name``, or ``import module`` if the name is empty."""

    module: str
    name: str = ""


Binding = ast.stmt | Imported


class ModuleSource:
    """The source of a module.

    Args:
        folder: Folder of its submodules, if it is a package.
        stubbed: Whether a .pyi file has its types.
        file: Where the source is; None for a folder without one.
    """

    def __init__(
        self, name: str, text: str, folder: Path | None = None, stubbed: bool = False, file: Path | None = None
    ) -> None:
        self.name, self.text, self.folder, self.stubbed, self.file = name, text, folder, stubbed, file
        self._scan = cache(self._scan_statements)

    @cached_property
    def tree(self) -> ast.Module:
        """The whole syntax tree; slow for a large file."""
        return ast.Module(_parse(self.text), [])

    @cached_property
    def dynamic(self) -> bool:
        """Whether it may define names without a statement."""
        # lockstep has a __getattr__, but also a statement for each name.
        return self.name != "lockstep" and any(mark in self.text for mark in _DYNAMIC)

    @cached_property
    def stars(self) -> list[str]:
        """Modules that it imports with ``import *``."""
        found = self._scan("*") if "import *" in self.text else []
        return [item.module for item in found if isinstance(item, Imported)]

    @cached_property
    def classes(self) -> list[str]:
        """Names of the public classes that it defines; for a package, also of those that it imports."""
        names = re.findall(r"^class (\w+)", self.text, re.MULTILINE)
        for node in self.tree.body if self.folder is not None else []:
            if isinstance(node, ast.ImportFrom):
                names += [name for alias in node.names if (name := alias.asname or alias.name)[0].isupper()]
        return [name for name in names if not name.startswith("_")]

    @cached_property
    def defines_types(self) -> bool:
        """Whether it imports jsonargparse, and so may register types."""
        return "jsonargparse" in self.text and bool(re.search(r"^\s*(?:import|from) jsonargparse", self.text, re.MULTILINE))

    def bindings(self, name: str) -> list[Binding]:
        """Statements and imports that bind ``name`` in the module, also inside ``if`` and ``try``."""
        if not _has_word(self.text, name):
            return []
        return self._scan(name) or list(self.bindings_in(self.tree.body, name))

    def is_builtin(self, name: str) -> bool:
        """Whether the module does not redefine the builtin ``name``, such as ``int``."""
        return not self._scan(name)

    def mentions(self, name: str) -> bool:
        """Whether the module assigns ``name`` anywhere, or contains it as a string."""
        return _has_word(self.text, name) and any(
            (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store))
            or (isinstance(node, ast.Constant) and node.value == name)
            or (isinstance(node, ast.Global) and name in node.names)
            for node in ast.walk(self.tree)
        )

    def _scan_statements(self, name: str) -> list[Binding]:
        """Like ``bindings``, but in top-level statements that contain the name; empty if one of them cannot be parsed."""
        found: list[Binding] = []
        for defined, part in self._parts:
            if defined in ("", name) and ("import *" in part if name == "*" else _has_word(part, name)):
                try:
                    body = _class_body(part) if defined else _parse(part)
                except Undecidable:  # not a statement, but lines of a string that look like one
                    return []
                found += self.bindings_in(body, name)
        return found

    @cached_property
    def _parts(self) -> list[tuple[str, str]]:
        """Top-level statements, each with the name of the class or function that it defines, or an empty name."""
        parts = [(part.startswith(("class ", "def ", "async def ", "@")), part) for part in statements(self.text)]
        return [(found[1] if defines and (found := _DEFINITION.search(part)) else "", part) for defines, part in parts]

    def bindings_in(self, body: Sequence[ast.stmt], name: str) -> Iterator[Binding]:
        """Like ``bindings``, but in the statements ``body``."""
        for node in body:
            match node:
                case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                    if node.name == name:
                        yield node
                case ast.Assign():
                    if any(isinstance(part, ast.Name) and part.id == name for to in node.targets for part in ast.walk(to)):
                        yield node
                case ast.AnnAssign(target=ast.Name(id=target)):
                    if target == name:
                        yield node
                case ast.ImportFrom():
                    names = [alias.name for alias in node.names if (alias.asname or alias.name) == name]
                    yield from (Imported(self._absolute(node), imported) for imported in names)
                case ast.Import():
                    for alias in node.names:
                        if (alias.asname or alias.name.partition(".")[0]) == name:
                            yield Imported(alias.name if alias.asname else name)
                case _:
                    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                        yield from self.bindings_in(getattr(node, field, []), name)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - node.level + (self.folder is not None)]
        return ".".join([*parts, *([node.module] if node.module else [])])


def statements(text: str, indent: str = "") -> Iterator[str]:
    """Split source into the statements at one level of indentation, each with its decorators.

    Text before the first statement belongs to it. Lines in triple quotes belong to their statement.
    """
    begin = re.compile(
        rf"\n{indent}(?=[^\s#)\]}}])(?!(?:else|elif|except|finally)\b)"
    )  # faster than ^, which has no first character
    start = seen = quotes = 0
    decorated = True  # no statement yet
    for found in begin.finditer(f"\n{text}"):
        at = found.start()  # in text, the beginning of the line
        quotes += text.count('"""', seen, at) + text.count("'''", seen, at)
        seen = at
        if quotes % 2:
            continue
        if not decorated:
            yield text[start:at]
            start = at
        decorated = text.startswith("@", at + len(indent))
    yield text[start:]


def _has_word(text: str, word: str) -> bool:
    """Whether ``word`` is in ``text``, and not only within other words; faster than to compile a pattern for each word."""
    end = 0
    while (start := text.find(word, end)) >= 0:
        end = start + len(word)
        if not any(near.isalnum() or near == "_" for near in text[start - 1 : start] + text[end : end + 1]):
            return True
    return False


def _class_body(text: str) -> list[ast.stmt]:
    """Parse a class without its methods other than ``__init__`` and ``__new__``; parse a function whole."""
    indent = re.search(r"^[ \t]+(?=\S)", text, re.MULTILINE)
    if indent is None or re.search(r"^class ", text, re.MULTILINE) is None:
        return _parse(text)
    kept = []
    for number, part in enumerate(statements(text, indent[0])):
        method = re.search(rf"^{indent[0]}(?:async )?def (\w+)", part, re.MULTILINE)
        if number == 0 or method is None or method[1] in ("__init__", "__new__"):
            kept.append(part)
    try:
        return _parse(f"{''.join(kept).rstrip()}\n{indent[0]}pass\n")
    except Undecidable:
        return _parse(text)


def parse(text: str) -> ast.Module:
    """Parse source without warnings, such as that about an invalid escape sequence; importing the module shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def _parse(text: str) -> list[ast.stmt]:
    try:
        return parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Undecidable from None
