"""``attempts.jsonl``: one line per attempt that has ended."""

import json
import logging
import os
import sys
from dataclasses import dataclass

from lockstep.runs.records import Record
from lockstep.runs.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt(Record):
    """One start of a run, once it has ended.

    Attributes:
        reason: Why it ended; empty if the run finished.
        exit_status: Of srun.
        started_at, ended_at: In seconds since 1970.
        saved_step: Step of the newest checkpoint at its end; 0 before the first.
        step: Optimizer steps done, as far as is known.
        crashed: Whether neither Slurm nor a person ended it.
        preempted: Whether Slurm ended it for reasons of its own: preempted, requeued, a node lost.
    """

    attempt: int
    job: str
    reason: str
    exit_status: int
    started_at: float
    ended_at: float
    saved_step: int
    step: int
    crashed: bool
    preempted: bool = False


def read_attempts(run: Run) -> list[Attempt]:
    """Return all attempts that were recorded; a partial line, as a full disk leaves it, is skipped."""
    path = run.folder / "attempts.jsonl"
    found = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            found.append(Attempt.from_dict(json.loads(line)))
        except (ValueError, TypeError):
            log.warning("line %d of %s is damaged and ignored", number, path)
    return found


def append_attempt(run: Run, attempt: Attempt) -> None:
    """Record an attempt; a full disk leaves no partial line and does not end the run."""
    path = run.folder / "attempts.jsonl"
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(json.dumps(attempt.as_dict(), ensure_ascii=False) + "\n")
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        print(f"lockstep: {path} could not be written ({error.strerror}).", file=sys.stderr)
