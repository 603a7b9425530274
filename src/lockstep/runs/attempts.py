"""How attempts end: which rank failed first (``logs/<attempt>/failure.json``), and ``attempts.jsonl``, a line for each of them.

When one rank fails all others do, with errors about lost connections that say nothing. Only the first is told; the others
say that it was. No torch here: ``jobs`` reads it.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass

from lockstep.runs.run import Run


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


def read_attempts(run: Run) -> list[Attempt]:
    """All attempts that have ended, as far as somebody was left to note it."""
    path = run.folder / "attempts.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):  # half a line, which a full disk has left
            continue
    return found


def append_attempt(run: Run, attempt: Attempt) -> None:
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
