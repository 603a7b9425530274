"""The supervisor of a Slurm job, which its batch script calls before and after each attempt, outside of srun.

``python -m lockstep.slurm.supervisor FOLDER start`` claims an attempt and prints its number and when the allocation ends.
``… FOLDER finish STATUS`` records the attempt and prints what follows: ``restart`` (in this allocation), ``requeue`` (wait for
another one), or the exit status of the job.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lockstep.compat.submitit import load_task
from lockstep.core import LockstepError
from lockstep.runs import AttemptStart, Owner, Run, RunProgress, RunResult, attempts, endings, read_first_failure, update_status
from lockstep.slurm.client import SLURM_TIMEOUT_SECONDS, allocation_end, cancel_steps, is_owner_alive, is_preempted
from lockstep.slurm.restart_policy import REQUEUE, RESTART, reason_to_give_up


def start(run: Run, slurm: Path, env: Mapping[str, str]) -> int:
    """Claim the next attempt for this job and return its number; UsageError if another job has the run."""
    number = run.claim_attempt(Owner(job=env["SLURM_JOB_ID"]), lambda owner: is_owner_alive(owner, env, SLURM_TIMEOUT_SECONDS))
    output = slurm / f"{env['LOCKSTEP_JOB']}_0_log.out"
    printed = output.stat().st_size if output.exists() else 0
    AttemptStart(env["LOCKSTEP_JOB"], time.time(), printed).write(run.start_record(number))
    _record_lost_attempts(run, number)
    return number


def finish(run: Run, slurm: Path, status: int, env: Mapping[str, str]) -> str | int:
    """Record how the attempt ended; return 0 if the run is finished, RESTART, REQUEUE, or the exit status of the run."""
    number, job = run.newest_attempt, env["SLURM_JOB_ID"]
    result, failure = RunResult.read(run.result), read_first_failure(run, number)
    if result is not None and result.attempts != number and not result.is_finished:
        result = None  # that of the attempt before
    ending = endings.classify_ending(endings.Evidence(result, failure, run.output(slurm, env["LOCKSTEP_JOB"]), status))
    start, progress = AttemptStart.read(run.start_record(number)), RunProgress.read(run.status)
    attempt = attempts.Attempt(
        attempt=number,
        job=job,
        reason=ending.reason,
        exit_status=status,
        started_at=start.time if start is not None else 0.0,
        ended_at=time.time(),
        saved_step=run.latest_saved_step,
        step=(result and result.global_step) or (progress.step if progress is not None else 0),
        crashed=not (ending.is_finished or ending.is_interrupted),
    )
    ended = [*attempts.read_attempts(run), attempt]
    attempts.append_attempt(run, attempt)
    if status > 128:
        cancel_steps(job, env)
    if ending.is_finished:
        return 0
    if failure is not None and failure.is_permanent:
        return _give_up(run, status, "")
    if not is_owner_alive(Owner(job=job), env, SLURM_TIMEOUT_SECONDS):
        return status or 1  # cancelled, or Slurm requeues it by itself
    if ending.is_interrupted:  # preempted, out of time, or ended by a person
        return REQUEUE if ending.exit_status == 128 + signal.SIGUSR2 or is_preempted(job, env) else RESTART
    why = reason_to_give_up(run, ended, ending.is_explained)
    return _give_up(run, status, why) if why else RESTART


def _record_lost_attempts(run: Run, newest: int) -> None:
    """Record earlier attempts whose batch script was killed before it could record them."""
    recorded = {attempt.attempt for attempt in attempts.read_attempts(run)}
    result, progress = RunResult.read(run.result), RunProgress.read(run.status)
    for number in range(1, newest):
        start = AttemptStart.read(run.start_record(number))
        if number in recorded or start is None:
            continue
        reason = result.reason if result is not None and result.attempts == number else None
        attempt = attempts.Attempt(
            attempt=number,
            job=start.job,
            reason=reason or "Slurm ended the job: preempted, requeued, or a node was lost.",
            exit_status=1,
            started_at=start.time,
            ended_at=progress.time if progress is not None and progress.attempt == number else start.time,
            saved_step=run.latest_saved_step,
            step=progress.step if progress is not None else 0,
            crashed=False,
        )
        attempts.append_attempt(run, attempt)


def _give_up(run: Run, status: int, why: str) -> int:
    """Record that no attempt follows, and return the exit status of the job."""
    if why:
        replace(RunResult.read(run.result) or RunResult("failed"), status="failed", reason=why, exit_status=status or 1).write(
            run.result
        )
    update_status(run, "failed")
    return status or 1


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Run ``FOLDER start`` or ``FOLDER finish STATUS`` and return the exit status."""
    slurm, what, *rest = Path(arguments[0]), *arguments[1:]
    try:
        run = Run(load_task(slurm / f"{env['LOCKSTEP_JOB']}_submitted.pkl").folder)
        if what == "start":
            print(start(run, slurm, env), allocation_end(env["SLURM_JOB_ID"], env))
        else:
            print(finish(run, slurm, int(rest[0]), env))
        return 0
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"lockstep: {error.filename} cannot be read or written ({error.strerror}).", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
