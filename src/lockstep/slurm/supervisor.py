"""What comes after the ranks of a Slurm job have ended: nothing, another start right here, or the queue.

The batch script asks, outside of srun. ``start`` prints the number of the next attempt and when the allocation ends.
``finish STATUS`` prints ``restart`` (in this allocation), ``requeue`` (wait for another one), or the exit status of the job.
Every end is noted in ``attempts.jsonl``.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.compat.submitit import load_task
from lockstep.core import SIGNAL_EXIT_STATUSES, LockstepError, atomic_write_json, read_json
from lockstep.runs import (
    Attempt,
    Run,
    append_attempt,
    attempt_output,
    exited_task,
    has_known_cause,
    killed_task,
    read_attempts,
    read_first_failure,
    update_status,
)
from lockstep.slurm.client import PATIENCE_SECONDS, allocation_end, cancel_steps, is_owner_alive, is_preempted
from lockstep.slurm.restart_policy import REQUEUE, RESTART, reason_to_give_up


def start(run: Run, slurm: Path, env: Mapping[str, str]) -> int:
    """Claim the next attempt for this job and return its number.

    Raises:
        LockstepError: Another job has the run.
    """
    number = run.begin_attempt({"job": env["SLURM_JOB_ID"]}, lambda owner: is_owner_alive(owner, env, PATIENCE_SECONDS))
    output = slurm / f"{env['LOCKSTEP_JOB']}_0_log.out"
    begun = {"job": env["LOCKSTEP_JOB"], "time": time.time(), "output": output.stat().st_size if output.exists() else 0}
    atomic_write_json(run.folder / "logs" / str(number) / "begun.json", begun)
    _record_lost_attempts(run, number)
    return number


def finish(run: Run, slurm: Path, status: int, env: Mapping[str, str]) -> str | int:
    """Note how an attempt has ended, and say what comes next.

    Returns:
        0 if the run is finished, ``RESTART``, ``REQUEUE``, or the run's exit status.
    """
    number, job = run.newest_attempt, env["SLURM_JOB_ID"]
    result, failure = read_json(run.result), read_first_failure(run, number)
    if result.get("attempts") != number and result.get("status") != "finished":
        result = {}  # of the attempt before
    finished = result.get("status") == "finished"
    interrupted = (
        result.get("status") == "interrupted" or (failure is not None and failure.interrupted) or status in SIGNAL_EXIT_STATUSES
    )
    output = attempt_output(run, slurm, env["LOCKSTEP_JOB"])
    said = killed_task(output) or exited_task(output, failure)
    if failure is not None and not failure.is_secondary and not failure.interrupted:
        reason, interrupted = failure.reason, False
    elif said and result.get("status") != "interrupted":
        reason, interrupted = said, False
    elif failure is not None and result.get("status") != "interrupted":
        reason = failure.reason  # a signal; what rank zero says is only that a peer was gone
    else:
        reason = str(result.get("reason") or f"it ended with exit status {status}")
    before = read_attempts(run)
    step = int(result.get("global_step") or read_json(run.status).get("step") or 0)
    crashed = not (finished or interrupted)
    this = Attempt(
        number,
        job,
        "" if finished else reason,
        status,
        _start_record(run, number)["time"],
        time.time(),
        _latest_saved_step(run),
        step,
        crashed,
    )
    append_attempt(run, this)
    if status > 128:
        cancel_steps(job, env)
    if finished:
        return 0
    if failure is not None and failure.is_permanent:
        return _give_up(run, status, "")
    if not is_owner_alive({"job": job}, env, PATIENCE_SECONDS):
        return status or 1  # cancelled, or Slurm queues it again by itself
    if interrupted:  # by Slurm, which wants the nodes back or whose time is up, or by somebody else
        return REQUEUE if "SIGUSR2" in reason or is_preempted(job, env) else RESTART
    return (
        _give_up(run, status, why)
        if (why := reason_to_give_up(run, [*before, this], has_known_cause(output, failure)))
        else RESTART
    )


def _start_record(run: Run, attempt: int) -> dict[str, Any]:
    """When and by which job an attempt was begun."""
    return read_json(run.folder / "logs" / str(attempt) / "begun.json")


def _latest_saved_step(run: Run) -> int:
    """Step of the newest checkpoint; 0 before the first."""
    return max((int(path.name[5:]) for path in run.checkpoints.glob("step-*") if path.name[5:].isdigit()), default=0)


def _record_lost_attempts(run: Run, newest: int) -> None:
    """Note attempts of which nobody was left to note the end: Slurm had taken the batch script too."""
    noted = {attempt.attempt for attempt in read_attempts(run)}
    result, status = read_json(run.result), read_json(run.status)
    for number in range(1, newest):
        begun = _start_record(run, number)
        if number in noted or not begun:
            continue
        told = str(result.get("reason", "")) if result.get("attempts") == number else ""
        reason = told or "Slurm ended the job: preempted, requeued, or a node was lost."
        ended = float(status.get("time", begun["time"])) if status.get("attempt") == number else begun["time"]
        append_attempt(
            run,
            Attempt(
                number, begun["job"], reason, 1, begun["time"], ended, _latest_saved_step(run), status.get("step", 0), False
            ),
        )


def _give_up(run: Run, status: int, why: str) -> int:
    """Write down that nothing comes after this."""
    if why:
        atomic_write_json(run.result, {"world_size": 0} | read_json(run.result) | {"status": "failed", "reason": why})
    update_status(run, "failed")
    return status or 1


def _run_of(slurm: Path, env: Mapping[str, str]) -> Run:
    """The run of this job, or of this task of an array."""
    job = env["LOCKSTEP_JOB"]
    return Run(Path(load_task(slurm / f"{job}_submitted.pkl").folder))


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """``supervisor FOLDER start`` or ``supervisor FOLDER finish STATUS``."""
    folder, what, *rest = arguments
    try:
        run = _run_of(Path(folder), env)
        if what == "start":
            print(start(run, Path(folder), env), allocation_end(env["SLURM_JOB_ID"], env))
            return 0
        print(finish(run, Path(folder), int(rest[0]), env))
        return 0
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"lockstep: {error.filename} cannot be read or written ({error.strerror}).", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
