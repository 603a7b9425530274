"""The restart policy: when to give up a run that keeps failing."""

from collections.abc import Sequence

import yaml

from lockstep.config import RunOptions
from lockstep.runs import OVER_MEMORY, Attempt, Run

RESTART, REQUEUE = "restart", "requeue"
"""What the supervisor prints: restart in this allocation, or wait for another one."""

ASK_AGAIN = 75
"""Exit status of the supervisor if it needs a newer answer from Slurm (EX_TEMPFAIL of sysexits.h)."""

ALREADY_FINISHED = 76
"""Exit status of the supervisor if this job has finished its run already: Slurm 24.11 requeues a preempted job twice."""

_SAME_FAILURE_LIMIT = 2
"""Attempts in a row with the same step and reason after which the run is given up."""

_NO_PROGRESS_LIMIT = 25
"""Attempts in a row without a new checkpoint after which the run is given up, except those that Slurm itself ended."""


def _max_restarts(run: Run) -> int:
    """``run.max_restarts`` of the run; the default if the config cannot be read, as the ranks then fail and say so."""
    try:
        return int(yaml.safe_load(run.config.read_text())["run"]["max_restarts"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return RunOptions.max_restarts


def _is_same(one: str, other: str) -> bool:
    """Whether two reasons of failed attempts are the same; those of out of memory differ in their amounts."""
    return one == other or (one.startswith(OVER_MEMORY) and other.startswith(OVER_MEMORY))


def reason_to_give_up(run: Run, ended: Sequence[Attempt], is_explained: bool) -> str:
    """Return why another attempt would end like the last of all ``ended`` ones; empty if it may succeed."""
    last = ended[-1]
    limit = _max_restarts(run)
    if sum(attempt.crashed for attempt in ended) > limit:
        return f"It has crashed more than run.max_restarts={limit} times; the last: {last.reason}"
    same_step = [attempt.crashed and attempt.saved_step == last.saved_step for attempt in ended]
    same_reason = [_is_same(attempt.reason, last.reason) for attempt in ended[-_SAME_FAILURE_LIMIT:]]
    if is_explained and len(same_reason) == _SAME_FAILURE_LIMIT and all([*same_reason, *same_step[-_SAME_FAILURE_LIMIT:]]):
        return (
            f"It has failed {_SAME_FAILURE_LIMIT} times in a row after the checkpoint of step {last.saved_step}: {last.reason}"
        )
    counted = [attempt for attempt in ended if not attempt.preempted][-_NO_PROGRESS_LIMIT:]
    if len(counted) == _NO_PROGRESS_LIMIT and all(attempt.saved_step == last.saved_step for attempt in counted):
        many = f"{_NO_PROGRESS_LIMIT} attempts in a row have saved no checkpoint after step {last.saved_step}"
        return f"{many}; the last: {last.reason}"
    return ""
