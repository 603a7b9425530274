"""A progress line at the bottom of a terminal; whatever else is printed stays above it."""

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

_CLEAR = "\r\x1b[K"


def is_terminal(stream: TextIO, env: Mapping[str, str]) -> bool:
    """Whether ``stream`` is a terminal that can clear a line."""
    return stream.isatty() and env.get("TERM") != "dumb"


def clear_line(stream: TextIO) -> None:
    """Clear what another process, or the terminal itself, left on the current line, if ``stream`` is a terminal."""
    if is_terminal(stream, os.environ):
        stream.write(_CLEAR)


def columns(stream: TextIO) -> int:
    """Width of the terminal ``stream``; 80 if it is unknown."""
    return os.get_terminal_size(stream.fileno()).columns or 80


def fold(line: str, width: int, indent: int) -> str:
    """Break a line wider than ``width`` at double spaces only, which keeps commands and pairs of name and value whole."""
    lines, *rest = line.split("  ")
    length = len(lines)
    for part in rest:
        fits = length + 2 + len(part) <= width
        lines += f"  {part}" if fits else f"\n{' ' * indent}{part}"
        length = (length + 2 if fits else indent) + len(part)
    return lines


class LiveLine:
    """A progress line at the bottom of the terminal on standard error; ``show`` replaces it.

    While it is open, Python prints and logs above it. The cursor rests in its first column, so that anything else,
    such as the ``^C`` of the terminal, writes over it.
    """

    def __init__(self) -> None:
        self._terminal: TextIO | None = None  # None while the line is not open
        self._has_partial_line = False

    def open(self) -> None:
        """Let standard output and error make room for the line."""
        if self._terminal is None:
            self._terminal = sys.stderr
            for name in ("stdout", "stderr"):
                if (stream := getattr(sys, name)).isatty():
                    setattr(sys, name, _AboveLine(stream, self))

    def show(self, parts: Iterable[str]) -> None:
        """Replace the line by the first of ``parts``, as many as fit the width of the terminal."""
        if self._terminal is None or self._has_partial_line:
            return
        lines = fold("  ".join(filter(None, parts)), width := columns(self._terminal) - 1, indent=0)
        self._terminal.write(f"\r{lines.partition(chr(10))[0][:width]}\x1b[K\r")
        self._terminal.flush()

    def close(self) -> None:
        """Clear the line and restore the streams."""
        if self._terminal is None:
            return
        self._terminal.write(self.make_room(""))
        self._terminal.flush()
        for name in ("stdout", "stderr"):
            if isinstance(stream := getattr(sys, name), _AboveLine):  # not if someone else has replaced it meanwhile
                setattr(sys, name, stream.stream)
        self._terminal = None

    def make_room(self, text: str) -> str:
        """Return the control codes to write before ``text``."""
        before = "" if self._has_partial_line else _CLEAR  # the terminal may have written ^C where no line is shown
        self._has_partial_line = not text.endswith("\n") if text else self._has_partial_line
        return before


class _AboveLine:
    """A stream that clears the line before it writes."""

    def __init__(self, stream: TextIO, line: LiveLine) -> None:
        self.stream, self._line = stream, line

    def write(self, text: str) -> int:
        self.stream.write(self._line.make_room(text) + text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
