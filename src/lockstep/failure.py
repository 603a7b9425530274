"""How attempts end: which rank failed first (``logs/<attempt>/failure.json``), and ``attempts.jsonl``, a line for each of them.

When one rank fails all others do, with errors about lost connections that say nothing. Only the first is told; the others
say that it was. No torch here: ``jobs`` reads it.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lockstep.errors import SIGNALLED
from lockstep.run import Run

_PATIENCE_SECONDS = 5.0
"""How long a rank that has lost its peers waits for the one that knows why."""


@dataclass(frozen=True)
class Failure:
    """The end of a rank that failed.

    Attributes:
        rank: The rank.
        size: Number of ranks.
        node: Number of its node.
        host: Name of its machine.
        report: One sentence, or a traceback.
        exit_status: What the rank exits with.
        echo: Whether it only lost a connection, because another rank was gone.
        final: Whether another start would fail in the same way.
    """

    rank: int
    size: int
    node: int
    host: str
    report: str
    exit_status: int = 1
    echo: bool = False
    final: bool = False

    @property
    def interrupted(self) -> bool:
        """Whether it was a signal that ended the rank."""
        return self.exit_status in SIGNALLED

    @property
    def reason(self) -> str:
        """One line: the rank, and the last line of its report."""
        last = self.report.strip().splitlines()[-1]
        return last if self.size == 1 else f"rank {self.rank} {self.place}: {last}"

    @property
    def place(self) -> str:
        """Its node, and its machine where that is known."""
        return f"(node {self.node}{', ' if self.host else ''}{self.host})"


@dataclass(frozen=True)
class Attempt:
    """One start of a run, once it has ended.

    Attributes:
        attempt: Its number.
        job: Slurm's id.
        reason: Why it ended; empty if the run was finished.
        exit_status: Of srun.
        begun, ended: When, in seconds since 1970.
        saved: Step of the newest checkpoint at its end; 0 before the first.
        step: Optimizer steps done, as far as is known.
        crashed: Whether it ended against its will and that of Slurm.
    """

    attempt: int
    job: str
    reason: str
    exit_status: int
    begun: float
    ended: float
    saved: int
    step: int
    crashed: bool


def attempts(run: Run) -> list[Attempt]:
    """All attempts that have ended, as far as somebody was left to note it."""
    path = run.folder / "attempts.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):  # half a line, which a full disk has left
            continue
    return found


def note(run: Run, attempt: Attempt) -> None:
    """Add an attempt that has ended to the others."""
    path = run.folder / "attempts.jsonl"
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(json.dumps(asdict(attempt), ensure_ascii=False) + "\n")
    except OSError as error:  # a full disk: the run goes on while it can
        if path.exists():
            os.truncate(path, size)
        print(f"lockstep: {path} could not be written ({error.strerror}).", file=sys.stderr)


def first_failure(run: Run, attempt: int) -> Failure | None:
    """What the first rank to fail in this attempt wrote down."""
    try:
        return Failure(**json.loads(_file(run, attempt).read_text()))
    except FileNotFoundError:
        return None


def wait_for_cause(run: Run, attempt: int) -> Failure | None:
    """The first failure, waiting a moment for it: for a rank that only lost its peers."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (found := first_failure(run, attempt)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def record_failure(run: Run, attempt: int, failure: Failure) -> Failure:
    """Write ``failure`` down if it is the first of this attempt, and tell it in rank zero's log; return the first one."""
    path = _file(run, attempt)
    beside = path.with_name(f".failure.{failure.rank}")
    beside.write_text(json.dumps(asdict(failure), indent=2, ensure_ascii=False))
    try:
        os.link(beside, path)  # fails where there is one: who comes first is decided by the file system
    except FileExistsError:
        return first_failure(run, attempt) or failure
    finally:
        beside.unlink()
    what = "lost a peer that has left no word" if failure.echo else "failed first"
    place = f"rank {failure.rank} of {failure.size} {failure.place} {what}.\n" if failure.size > 1 else ""
    with run.log(attempt, 0).open("a") as log:
        log.write(f"lockstep: {place}{failure.report.rstrip()}\n")
    return failure


def _file(run: Run, attempt: int) -> Path:
    return run.log(attempt, 0).with_name("failure.json")
