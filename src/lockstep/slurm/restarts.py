"""Claim, record and restart attempts of a job, for its batch script (``supervisor``) and for the agents of its nodes."""

import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lockstep.runs import AttemptStart, Owner, Run, RunProgress, RunResult, attempts, endings, read_first_failure, update_status
from lockstep.slurm.client import RunningJob, is_owner_alive, is_running, parse_running_jobs
from lockstep.slurm.restart_policy import REQUEUE, RESTART, reason_to_give_up


class UnknownOwner(Exception):
    """Another job has claimed ``attempt``, perhaps after the query to Slurm: query Slurm again."""

    def __init__(self, attempt: int) -> None:
        super().__init__(attempt)
        self.attempt = attempt


class AlreadyFinished(Exception):
    """This job has finished its run, and Slurm has started it again."""


class SlurmView(NamedTuple):
    """The jobs that Slurm runs, as the batch script has queried them.

    Attributes:
        me: This job.
        jobs: The user's running jobs; None if Slurm has not answered.
        seen: The newest attempt that was known before the query.
    """

    me: Owner
    jobs: Mapping[str, RunningJob] | None
    seen: int = 0

    @classmethod
    def parse(cls, text: str, env: Mapping[str, str], seen: int = 0) -> "SlurmView":
        """Build it from the environment of the job, and from what its batch script has written to standard input."""
        *lines, end = text.splitlines() or [""]
        return cls(Owner.of_job(env), parse_running_jobs("\n".join(lines)) if end == "end" else None, seen)

    @property
    def my_job(self) -> RunningJob | None:
        """This job, while it runs."""
        return (self.jobs or {}).get(self.me.job or "")

    def is_alive(self, owner: Owner, env: Mapping[str, str]) -> bool | None:
        """Whether an owner still runs; one counts as alive while Slurm does not answer. Raises UnknownOwner."""
        if owner.job is None:
            return is_owner_alive(owner, env)
        if owner.job == self.me.job:
            return owner.restarts > self.me.restarts
        if self.jobs is None or is_running(owner, self.jobs):
            return True
        if owner.attempt != self.seen:
            raise UnknownOwner(owner.attempt)
        return False


def start(run: Run, slurm: Path, view: SlurmView, env: Mapping[str, str]) -> int:
    """Claim the next attempt for this job and return its number.

    Raises:
        UsageError: Another job has the run.
        AlreadyFinished: An earlier attempt of this job has finished it.
    """
    job = env["LOCKSTEP_JOB"]
    if run.is_finished_by(job) and job in {attempt.job for attempt in attempts.read_attempts(run)}:
        raise AlreadyFinished
    number = run.claim_attempt(view.me, lambda owner: view.is_alive(owner, env))
    output = slurm / f"{job}_0_log.out"
    printed = output.stat().st_size if output.exists() else 0
    AttemptStart(job, time.time(), printed).write(run.start_record(number))
    attempts.record_earlier_attempts(run, number)
    return number


def finish(run: Run, slurm: Path, status: int, view: SlurmView, env: Mapping[str, str]) -> str | int:
    """Record how the newest attempt ended; return 0 if the run is finished, RESTART, REQUEUE, or the exit status of the run."""
    if run.is_superseded(_newest_own_attempt(run, view, env)):  # the new owner records this attempt
        return status or 1
    attempt, decision, why = _decide(run, slurm, status, view, env)
    _record(run, attempt)
    return _give_up(run, attempt.attempt, status, why) if decision == _GIVE_UP else decision


def restart_in_allocation(run: Run, slurm: Path, status: int, env: Mapping[str, str]) -> int | None:
    """Record the attempt that ended and claim the next one for the agents to start; None if they must not restart.

    Slurm is not queried: it has sent the agents no signal, so it has neither cancelled nor preempted the job.

    Raises:
        UsageError: Another job has claimed the run.
    """
    view = SlurmView(Owner.of_job(env), None)
    if run.is_superseded(_newest_own_attempt(run, view, env)):
        return None
    attempt, decision, _ = _decide(run, slurm, status, view, env)
    if decision != RESTART:
        return None
    _record(run, attempt)
    return start(run, slurm, view, env)


_GIVE_UP = "give up"

_START_SECONDS = 20.0
"""An attempt is not started in an allocation that ends earlier, but in the next one."""


def _record(run: Run, attempt: attempts.Attempt) -> None:
    """Record an attempt, unless the agents have recorded it but could not start the next one."""
    if attempt.attempt not in {recorded.attempt for recorded in attempts.read_attempts(run)}:
        attempts.append_attempt(run, attempt)


def _newest_own_attempt(run: Run, view: SlurmView, env: Mapping[str, str]) -> int:
    """The newest attempt of this job: that of its batch script, or one that its agents have claimed since.

    An agent that was killed while it claimed one has perhaps not become the owner of the run.
    """
    claims = (Owner.read(run.owner), run.owner_of(run.newest_attempt))
    return max([int(env["LOCKSTEP_ATTEMPT"]), *(claim.attempt for claim in claims if claim is not None and claim == view.me)])


def _decide(
    run: Run, slurm: Path, status: int, view: SlurmView, env: Mapping[str, str]
) -> tuple[attempts.Attempt, str | int, str]:
    """Return the record of the newest attempt, what follows, and why it gives up.

    What follows is an exit status, RESTART, REQUEUE or _GIVE_UP.
    """
    job, number, mine = env["LOCKSTEP_JOB"], _newest_own_attempt(run, view, env), view.my_job
    is_finished = run.is_finished_by(job)  # perhaps by an earlier attempt, whose end was not recorded
    result, failure = RunResult.read(run.result) if is_finished else run.result_of(number), read_first_failure(run, number)
    ending = endings.classify_ending(endings.Evidence(result, failure, run.output(slurm, job), status))
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
        preempted=ending.is_interrupted and mine is not None and mine.is_preempted,
    )
    if ending.is_finished:
        return attempt, 0, ""
    if failure is not None and failure.is_permanent:
        return attempt, _GIVE_UP, ""
    if view.jobs is not None and not is_running(view.me, view.jobs):
        return attempt, status or 1, ""  # cancelled, or Slurm requeues it by itself
    if attempt.preempted:
        return attempt, REQUEUE, ""
    earlier = [ended for ended in attempts.read_attempts(run) if ended.attempt != number]
    if why := reason_to_give_up(run, [*earlier, attempt], ending.is_explained):
        return attempt, _GIVE_UP, why
    is_out_of_time = ending.is_interrupted and ending.exit_status == 128 + signal.SIGUSR2
    end = mine.end if mine is not None else int(env.get("LOCKSTEP_ENDS") or 0)
    if end and time.time() > end - _START_SECONDS:  # Slurm requeues no job that it ends at its time limit
        is_out_of_time = True
    return attempt, REQUEUE if is_out_of_time else RESTART, ""


def _give_up(run: Run, attempt: int, status: int, why: str) -> int:
    """Record that no attempt follows this one, and return the exit status of the job."""
    was_finished = run.finished_before(attempt) is not None
    if why and not was_finished:
        replace(RunResult.read(run.result) or RunResult("failed"), status="failed", reason=why, exit_status=status or 1).write(
            run.result
        )
    update_status(run, "finished" if was_finished else "failed")
    return status or 1
