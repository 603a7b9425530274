"""The commands in README and docs, and what lockstep's own parsers make of one."""

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import pytest
from support.runs import REPO

Main = Callable[[Sequence[str]], int | None]

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]

SHELL = ("", "sh", "console")
"""Languages of the blocks that hold commands, possibly after the prompt ``$``; the language of other text is ``text``."""


class Block(NamedTuple):
    """A block of code, and the line of text before it."""

    before: str
    language: str
    content: str

    @property
    def file(self) -> str | None:
        """The file that a reader writes with this content: the line before ends with its name."""
        named = re.search(r"`([\w.]+)`:$|^`([\w.]+)`,.*:$", self.before)
        return named and (named[1] or named[2])


def blocks(text: str) -> list[Block]:
    """The blocks of code in a page."""
    found = re.findall(r"([^\n]*)\n+^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(*parts) for parts in found]


class Parsed(BaseException):
    """A parser has accepted a command line; not an Exception, so that no program handles it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def shell_lines(block: Block) -> list[str]:
    """Command lines in a block, without prompts; if it has prompts, only the lines that have one."""
    if block.language not in SHELL:
        return []
    lines = block.content.replace("\\\n", " ").splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in prompted or lines if line.strip() and not line.startswith("#")]


def inline_commands(text: str) -> list[str]:
    """Commands in the running text of a page: in backticks, one of lockstep's programs with an argument."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    programs = r"(?:python (?:launch|slurm|benchmarks)/\w+\.py|lockstep [a-z]+|make [a-z]+|torchrun)"
    found = [command.replace("\n", " ") for command in re.findall(rf"`({programs}[^`]*)`", prose)]
    return [command for command in found if len(command.split()) > 2 or command.startswith("make ")]


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command in a line of the shell, also of those in ``$(…)``; assignments are left out."""
    words = shlex.split(line, comments=True)
    commands: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "|", ";"):
            commands.append([])
        elif inner := re.fullmatch(r"(?:\w+=)?\$\((.*)\)", word):
            commands += [*simple_commands(inner[1]), []]
        else:
            commands[-1].append(word)
    return [command for command in commands if command and command != ["eval"]]


def parser_of(main: Main) -> argparse.ArgumentParser:
    """The parser that a program makes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, _stop)
        with pytest.raises(Parsed) as stopped:
            main([])
    return stopped.value.parser


def parse_only(main: Main, arguments: Sequence[str]) -> None:
    """Let a program parse ``arguments`` and stop it then; raise what it raises, or SystemExit, if it refuses them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", _parse_and_stop)
        with pytest.raises(Parsed):
            status = main(arguments)
            raise SystemExit(status)


def _stop(parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
    raise Parsed(parser)


def _parse_and_stop(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> NoReturn:
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unknown: {unknown}")
    raise Parsed(parser)
