"""``attempts.jsonl``: one line per attempt that has ended."""

import json
import logging
import os
import sys
from contextlib import suppress
from dataclasses import dataclass

from lockstep.runs.failure import read_first_failure
from lockstep.runs.records import AttemptStart, Record, RunProgress, RunResult
from lockstep.runs.run import Run

log = logging.getLogger(__name__)


_UNKNOWN_JOB = "Slurm ended the job: preempted, requeued, or a node was lost."
_UNKNOWN_LOCAL = "It ended without a report: its process was killed, or its machine was lost."
"""Reasons for attempts that left no report."""


@dataclass(frozen=True)
class Attempt(Record):
    """One start of a run, once it has ended.

    Attributes:
        job: Empty outside Slurm.
        reason: Why it ended; empty if the run finished.
        exit_status: Of srun, or of the ranks.
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
    """Return all recorded attempts; a damaged line is named and skipped."""
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
    before = path.read_bytes() if path.exists() else b""
    separator = "" if before.endswith(b"\n") or not before else "\n"  # after a partial line that a kill has left
    try:
        with path.open("a") as file:
            file.write(separator + json.dumps(attempt.as_dict(), ensure_ascii=False) + "\n")
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, len(before))
        print(f"lockstep: {path} could not be written ({error.strerror}).", file=sys.stderr)


def record_earlier_attempts(run: Run, newest: int) -> None:
    """Record the attempts before ``newest`` that are not recorded yet: local ones, and those whose batch script was killed."""
    recorded = {attempt.attempt for attempt in read_attempts(run)}
    result, progress = RunResult.read(run.result), RunProgress.read(run.status)
    for number in range(1, newest):
        if number not in recorded and (start := AttemptStart.read(run.start_record(number))) is not None:
            ended = result if result is not None and result.attempts == number else None
            append_attempt(run, _earlier_attempt(run, number, start, ended, progress))


def _earlier_attempt(
    run: Run, number: int, start: AttemptStart, result: RunResult | None, progress: RunProgress | None
) -> Attempt:
    """Build the record of an attempt from what it left; ``result`` is None if it wrote none."""
    reason, is_local = result.reason if result is not None else None, not start.job
    if is_local and (result is None or result.status != "interrupted"):  # rank zero may only know that a peer is gone
        failure = read_first_failure(run, number)
        reason = reason if failure is None else failure.reason
    if reason is None and (result is None or not result.is_finished):
        reason = _UNKNOWN_LOCAL if is_local else _UNKNOWN_JOB
    ended_at = progress.time if progress is not None and progress.attempt == number else start.time
    return Attempt(
        attempt=number,
        job=start.job,
        reason=reason or "",
        exit_status=result.exit_status if is_local and result is not None else 1,
        started_at=start.time,
        ended_at=ended_at,
        saved_step=run.latest_saved_step,
        step=progress.step if progress is not None else 0,
        crashed=is_local and (result is None or result.status == "failed"),
        preempted=not is_local,
    )
