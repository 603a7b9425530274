"""How attempts end: which rank failed first (``logs/<attempt>/failure.json``), and ``attempts.jsonl``, a line for each of them.

When one rank fails all others do, with errors about lost connections that say nothing. Only the first is told; the others
say that it was. No torch here: ``jobs`` reads it.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lockstep.core import SIGNAL_EXIT_STATUSES
from lockstep.runs.run import Run

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
        is_secondary: Whether it only lost a connection, because another rank was gone.
        is_permanent: Whether another start would fail in the same way.
    """

    rank: int
    size: int
    node: int
    host: str
    report: str
    exit_status: int = 1
    is_secondary: bool = False
    is_permanent: bool = False

    @property
    def interrupted(self) -> bool:
        """Whether it was a signal that ended the rank."""
        return self.exit_status in SIGNAL_EXIT_STATUSES

    @property
    def reason(self) -> str:
        """One line: the rank, and the last line of its report."""
        last = self.report.strip().splitlines()[-1]
        return last if self.size == 1 else f"rank {self.rank} {self.place}: {last}"

    @property
    def place(self) -> str:
        """Its node, and its machine where that is known."""
        return f"(node {self.node}{', ' if self.host else ''}{self.host})"


def read_first_failure(run: Run, attempt: int) -> Failure | None:
    """What the first rank to fail in this attempt wrote down."""
    try:
        return Failure(**json.loads(_failure_path(run, attempt).read_text()))
    except FileNotFoundError:
        return None


def wait_for_first_failure(run: Run, attempt: int) -> Failure | None:
    """The first failure, waiting a moment for it: for a rank that only lost its peers."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (found := read_first_failure(run, attempt)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def record_failure(run: Run, attempt: int, failure: Failure) -> Failure:
    """Write ``failure`` down if it is the first of this attempt, and tell it in rank zero's log; return the first one."""
    path = _failure_path(run, attempt)
    beside = path.with_name(f".failure.{failure.rank}")
    beside.write_text(json.dumps(asdict(failure), indent=2, ensure_ascii=False))
    try:
        os.link(beside, path)  # fails where there is one: who comes first is decided by the file system
    except FileExistsError:
        return read_first_failure(run, attempt) or failure
    finally:
        beside.unlink()
    what = "lost a peer that has left no word" if failure.is_secondary else "failed first"
    place = f"rank {failure.rank} of {failure.size} {failure.place} {what}.\n" if failure.size > 1 else ""
    with run.log(attempt, 0).open("a") as log:
        log.write(f"lockstep: {place}{failure.report.rstrip()}\n")
    return failure


def _failure_path(run: Run, attempt: int) -> Path:
    return run.log(attempt, 0).with_name("failure.json")
