"""Run rows one after another, each in a process of its own with its own time limit, and write a Markdown table as it goes.

Importing it needs no torch. A row is a function of a ``Place``; it prints what it does to its log, and yields lines of the
table, which are kept if it does not come to its end. A row that fails, hangs or crashes is a line of the table too, with the
end of its log.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

_LOG_LINES = 12
"""Lines at the end of the log of a failed row that the table shows."""


@dataclass(frozen=True)
class Line:
    """A line of the table: what was tried, what came out, and whether that is what was expected (None: a measurement)."""

    what: str
    result: str
    is_right: bool | None = None


@dataclass(frozen=True)
class Place:
    """Where a row runs.

    Attributes:
        folder: Empty folder of the row.
        device: ``cuda``, or ``cpu`` for a rehearsal with small sizes.
    """

    folder: Path
    device: str

    @property
    def is_rehearsal(self) -> bool:
        """Whether there is no GPU."""
        return self.device == "cpu"

    @property
    def accelerator(self) -> str:
        """Value of ``trainer.accelerator``."""
        return "cpu" if self.is_rehearsal else "gpu"


@dataclass(frozen=True)
class Row:
    """A row of the suite: its function, and the seconds that it may take."""

    name: str
    title: str
    seconds: int
    run: Callable[[Place], Iterable[Line]]


@dataclass
class Outcome:
    """How a row has ended."""

    row: Row
    seconds: float
    lines: list[Line]
    log: str = ""

    @property
    def is_right(self) -> bool:
        """Whether everything came out as expected."""
        return all(line.is_right is not False for line in self.lines)


@dataclass
class Suite:
    """Rows, and where their logs and the table go.

    Attributes:
        device: As in ``Place``.
        seconds: Time for all rows; those for which none is left are not run.
    """

    rows: Sequence[Row]
    folder: Path
    table: Path
    device: str
    seconds: float
    about: str = ""
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self) -> int:
        """Run all rows; return 0 if all came out as expected, else 1."""
        end = time.monotonic() + self.seconds
        self._write()
        for row in self.rows:
            left = end - time.monotonic()
            if left < min(10, row.seconds):
                outcome = Outcome(row, 0.0, [Line(row.title, "not run: no time was left", False)])
            else:
                outcome = self._run(row, min(row.seconds, left))
            self.outcomes.append(outcome)
            for line in outcome.lines:
                print(f"{_mark(line):5} {line.what}: {line.result} ({outcome.seconds:.0f} s)", flush=True)
            self._write()
        return 0 if all(outcome.is_right for outcome in self.outcomes) else 1

    def _run(self, row: Row, seconds: float) -> Outcome:
        place = Place(self.folder / row.name, self.device)
        place.folder.mkdir(parents=True)
        log = self.folder / f"{row.name}.log"
        receiver, sender = get_context("fork").Pipe(duplex=False)
        begin = time.monotonic()
        process = get_context("fork").Process(target=_run_in_process, args=(row, place, log, sender))
        process.start()
        sender.close()
        lines, is_over = list[Line](), False
        with suppress(EOFError):
            while not is_over and (left := begin + seconds - time.monotonic()) > 0:
                wait([receiver, process.sentinel], left)  # what it has started may hold the pipe open after a crash
                if not receiver.poll():
                    break
                line = receiver.recv()
                is_over = line is None
                lines += [] if is_over else [line]
        took = time.monotonic() - begin
        _kill_group(process.pid or 0)
        process.join()
        receiver.close()
        if not is_over:
            how = f"not finished after {seconds:.0f} s" if took >= seconds else f"ended with exit status {process.exitcode}"
            lines.append(Line(row.title, how, False))
        is_right = all(line.is_right is not False for line in lines)
        return Outcome(row, took, lines, "" if is_right else _end_of(log))

    def _write(self) -> None:
        """Write the table as far as it is known."""
        self.table.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.table.with_suffix(".tmp")
        temporary.write_text(self.markdown())
        temporary.replace(self.table)

    def markdown(self) -> str:
        """The table, and the ends of the logs of what failed."""
        text = f"{self.about}\n\n" if self.about else ""
        text += "| what | result | as expected | s |\n|---|---|---|---|\n"
        for outcome in self.outcomes:
            for number, line in enumerate(outcome.lines):
                took = f"{outcome.seconds:.0f}" if number == 0 else ""
                text += f"| {_cell(line.what)} | {_cell(line.result)} | {_mark(line)} | {took} |\n"
        if waiting := [row.title for row in self.rows[len(self.outcomes) :]]:
            text += f"\nNot run yet: {'; '.join(waiting)}.\n"
        for outcome in self.outcomes:
            if outcome.log:
                text += f"\n{outcome.row.title}, end of its log:\n\n```text\n{outcome.log}\n```\n"
        return text


def _run_in_process(row: Row, place: Place, log: Path, sender: Connection) -> None:
    """Run ``row`` as the leader of a process group, and send its lines."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    os.chdir(place.folder)
    try:
        for line in row.run(place):
            print(line, flush=True)
            sender.send(line)
    except BaseException as error:
        traceback.print_exc()
        said = " ".join(str(error).split())[:200]
        sender.send(Line(row.title, f"{type(error).__name__}: {said}", False))
    sender.send(None)
    sys.stdout.flush()
    os._exit(0)


def _kill_group(leader: int) -> None:
    """Kill a row with everything that it has started and that has not moved to a group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _end_of(log: Path) -> str:
    lines = [line[:300] for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return "\n".join(lines[-_LOG_LINES:])


def _mark(line: Line) -> str:
    return {True: "yes", False: "**no**", None: ""}[line.is_right]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
