"""Run something on a pseudo-terminal, type into it, and read its screen."""

import os
import pty
import re
import select
import sys
import termios
import time
import traceback
from collections.abc import Callable
from pathlib import Path


class Terminal:
    """A forked process with a terminal of its own. It has what this process has imported.

    Attributes:
        raw: Everything that was written to the terminal.
    """

    def __init__(self, main: Callable[[], int], columns: int, folder: Path) -> None:
        self.columns, self.raw, self._found = columns, "", 0
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            _run(main, columns, folder)

    def wait_for(self, text: str, seconds: float = 50) -> None:
        """Read until ``text`` comes after what the last call has found."""
        deadline = time.monotonic() + seconds
        while (at := self.raw.find(text, self._found)) < 0:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready and self._receive(), f"no {text!r}; the terminal shows:\n" + "\n".join(self.screen())
        self._found = at + len(text)

    def type(self, text: str) -> None:
        """Type ``text``; \\x03 is Ctrl-C."""
        os.write(self._terminal, text.encode())

    def wait(self) -> int:
        """Read until the process ends, and return its exit status."""
        while self._receive():
            pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _receive(self) -> bool:
        try:
            new = os.read(self._terminal, 65536)
        except OSError:  # the last process has closed it
            return False
        self.raw += new.decode(errors="replace")
        return bool(new)

    def screen(self) -> list[str]:
        """All lines, as a terminal that is tall enough shows them."""
        lines, column = [""], 0
        for token in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|.", self.raw, re.DOTALL):
            if token == "\r":
                column = 0
            elif token == "\n":
                lines.append("")
            elif token == "\x1b[K":
                lines[-1] = lines[-1][:column]
            elif token.isprintable():
                if column == self.columns:
                    lines.append("")
                    column = 0
                lines[-1] = lines[-1][:column].ljust(column) + token + lines[-1][column + 1 :]
                column += 1
        return lines


def _run(main: Callable[[], int], columns: int, folder: Path) -> None:
    status = 1
    try:
        termios.tcsetwinsize(0, (24, columns))
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        os.environ["TERM"] = "xterm"
        os.chdir(folder)
        status = main()
    except SystemExit as exit:
        status = int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
