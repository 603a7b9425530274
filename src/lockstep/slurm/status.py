"""The status of submitted runs, with or without accounting.

``squeue`` knows a job until a few minutes after its end (MinJobAge), accounting for months. The batch script writes its exit
status to ``slurm/<job>.exit``. A query while Slurm still knows the ended job writes the answer to ``slurm/<job>.ended.json``.
"""

import re
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lockstep.core import SIGNAL_EXIT_STATUSES
from lockstep.runs import (
    JobState,
    LaunchRecord,
    Owner,
    Run,
    RunProgress,
    RunResult,
    SweepRun,
    endings,
    read_attempts,
    read_first_failure,
)
from lockstep.slurm.accounting import query_accounting
from lockstep.slurm.client import NO_SQUEUE, query_jobs
from lockstep.slurm.dependencies import Dependency
from lockstep.slurm.registry import SubmittedJob

ACTIVE = 3
"""Exit status of ``jobs.py status`` for a job that waits or runs."""

_PENDING_REASONS = {
    "Resources": "for nodes to become free",
    "Priority": "behind jobs of higher priority",
    "BeginTime": "for its start time",
    "JobHeldUser": "because its user holds it (scontrol release)",
    "JobHeldAdmin": "because an administrator holds it",
    "ReqNodeNotAvail": "for nodes that are down, drained or reserved",
    "PartitionDown": "because its partition is down",
    "JobArrayTaskLimit": "for other runs of its sweep to end",
    "QOSMaxJobsPerUserLimit": "for one of your jobs to end (limit of the QOS)",
    "AssocGrpGRES": "for GPUs of your group to become free",
}
_IMPOSSIBLE_REASONS = {
    "PartitionTimeLimit": "it asks for more time than its partition gives",
    "PartitionNodeLimit": "it asks for more nodes than its partition gives",
    "BadConstraints": "no node can give what it asks for",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
}

_LIMIT_REASON = re.compile(r"(?P<place>Assoc|QOS)(?:(?P<per_job>Max\w+Per(?:Job|Node)|Min)|Grp|Max)")
"""Reasons that name a limit, such as AssocMaxWallDurationPerJobLimit and QOSGrpCpuLimit."""

_PLACES = {"Assoc": "account", "QOS": "QOS"}
"""Where such a limit is set."""


@dataclass(frozen=True)
class RunStatus:
    """The status of one run.

    Attributes:
        exit_status: 0 finished · 1 failed · 2 usage error · 3 waits, runs or unknown · 4 cancelled · 5 over its time limit ·
            6 out of memory · 7 a node failed · 130, 138, 140, 143 interrupted.
        state: One or a few words.
        message: One sentence; may be empty.
        slurm: Slurm's view; None if it has forgotten the job.
        command: What the job does: fit, test, export …
    """

    job: str
    run: Run
    exit_status: int
    state: str
    message: str
    slurm: JobState | None
    progress: RunProgress | None
    result: RunResult | None
    command: str = "fit"

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs, as far as is known."""
        return self.exit_status == ACTIVE

    @property
    def attempt(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        return self.run.newest_attempt

    @property
    def metrics(self) -> dict[str, float]:
        """The newest value of every metric."""
        result = self.result.metrics if self.result is not None else None
        return result or (self.progress.metrics if self.progress is not None else {})

    @property
    def sweep(self) -> SweepRun | None:
        """Which run of a sweep it is; None if of none."""
        launch = LaunchRecord.read(self.run.launch)
        return launch.sweep if launch is not None else None

    def as_dict(self) -> dict[str, Any]:
        """The status for ``--json``."""
        return {
            "job": self.job,
            "run": str(self.run.folder),
            "command": self.command,
            "state": self.state,
            "exit_status": self.exit_status,
            "message": self.message,
            "attempt": self.attempt,
            "attempts": [attempt.as_dict() for attempt in read_attempts(self.run)],
            "slurm": self.slurm.as_dict() if self.slurm is not None else None,
            "progress": self.progress.as_dict() if self.progress is not None else {},
            "metrics": self.metrics,
            "result": self.result.as_dict() if self.result is not None else {},
            "sweep": asdict(self.sweep) if self.sweep is not None else None,
        }


def mark_cancelled(statuses: Iterable[RunStatus]) -> None:
    """Record that these runs were cancelled: Slurm soon forgets a run of a sweep that never started."""
    for status in statuses:
        if status.is_active and (folder := _slurm_folder(status.run)).is_dir():
            with suppress(OSError):  # a full disk must not hide that the job is cancelled
                (folder / f"{status.job}.cancelled").touch()


def query_status(jobs: Iterable[SubmittedJob], env: Mapping[str, str]) -> list[RunStatus]:
    """Return the status of every run of these jobs and of those that follow them.

    Slurm is queried once, and its accounting once for the jobs that it has forgotten.
    """
    jobs = [link for job in jobs for link in job.links]
    members = [(id_, run, job) for job in jobs for id_, run in job.members]
    states, error = query_jobs({id_ for id_, _, job in members if not job.is_recycled}, env)
    unknown = {
        id_
        for id_, run, job in members
        if not (error or id_ in states or job.is_recycled or _ended_file(id_, run, job).exists())
    }
    accounted, accounting_error = query_accounting(unknown, env)
    states |= accounted
    return [
        replace(
            _run_status(id_, run, job, None if job.is_recycled else states.get(id_), error, accounting_error),
            command=job.command,
        )
        for id_, run, job in members
    ]


def _ended_file(job: str, run: Run, submitted: SubmittedJob) -> Path:
    """The file that keeps the state in which Slurm ended the job."""
    return _job_folder(run, submitted) / f"{job}.ended.json"


def _job_folder(run: Run, submitted: SubmittedJob) -> Path:
    return submitted.folder / "slurm" if (submitted.folder / "slurm").is_dir() else _slurm_folder(run)


def _run_status(
    job: str, run: Run, submitted: SubmittedJob, state: JobState | None, error: str, accounting_error: str
) -> RunStatus:
    """Combine what Slurm and the run folder say; ``error`` is that of squeue."""
    slurm, ended_file = _job_folder(run, submitted), _ended_file(job, run, submitted)
    if state is None:
        state = JobState.read(ended_file)
    elif state.has_ended and not ended_file.exists() and slurm.is_dir():
        with suppress(OSError):  # a full disk must not hide the status; the next query tries again
            state.write(ended_file)
    progress, result = RunProgress.read(run.status), RunResult.read(run.result)
    status, was_cancelled = _read_exit_status(slurm / f"{job}.exit"), (slurm / f"{job}.cancelled").exists()
    # A signal also ends the batch script of a job that Slurm requeues.
    is_told = status is not None and (status not in SIGNAL_EXIT_STATUSES or error == NO_SQUEUE)
    if error and not (state is not None or was_cancelled or is_told or (result is not None and result.is_finished)):
        message = f"Slurm does not answer: {error}"
        if status is not None:
            message += f" It was ended by {signal.Signals(status - 128).name}, and may have been requeued."
        return RunStatus(job, run, ACTIVE, "unknown", message, state, progress, result)
    failure = read_first_failure(run, run.newest_attempt)
    if state is not None and not state.has_ended:
        if state.state == "PENDING":
            return RunStatus(job, run, ACTIVE, "waiting", _pending_reason(state), state, progress, result)
        message = f"Attempt {run.newest_attempt} has failed: {failure.reason}" if failure is not None else ""
        with suppress(OSError):  # no retry of the batch script
            message = (slurm / f"{job}.retry").read_text(errors="replace").strip() or message
        return RunStatus(job, run, ACTIVE, state.state.lower(), message, state, progress, result)
    evidence = endings.Evidence(result, failure, run.output(slurm, job), status, state, was_cancelled, state is None)
    owner = Owner.read(run.owner)
    if owner is not None and owner.job not in (None, job):  # the newest attempt is that of another job
        # A job ends with 0 only if the run had finished then; since then another job may have resumed it.
        evidence = evidence._replace(result=RunResult("finished") if status == 0 else None, failure=None)
    elif not run.is_finished_by(job):
        evidence = evidence._replace(result=run.result_of(run.newest_attempt))
    ending = endings.classify_ending(evidence)
    if ending.state == "gone" and not run.newest_attempt and (launch := LaunchRecord.read(run.launch)) and launch.after:
        why = f"It never started: it was cancelled, or {launch.after} did not happen; Slurm has forgotten which."
        ending = endings.Ending("cancelled", endings.TERMINAL_STATES["CANCELLED"][0], why)
    reason = ending.reason
    if accounting_error and state is None and ending.state == "gone":
        reason += f" Accounting does not answer: {accounting_error}"
    return RunStatus(job, run, ending.exit_status, ending.state, reason, state, progress, result)


def _pending_reason(state: JobState) -> str:
    waits = Dependency.of_squeue(state.dependency).describe() or "another job"
    impossible = {"DependencyNeverSatisfied": f"it waits for {waits}, which cannot happen any more", **_IMPOSSIBLE_REASONS}
    limit = _LIMIT_REASON.match(state.reason)
    if limit is not None and limit["per_job"]:
        impossible[state.reason] = f"its {_PLACES[limit['place']]} does not allow a job of this size or time limit"
    if state.reason in impossible:
        return f"It will never start: {impossible[state.reason]} (Slurm: {state.reason}); cancel it."
    if state.reason == "Dependency":
        return f"It waits for {waits}."
    if state.reason == "None":
        return "Slurm has not scheduled it yet."
    default = f"for what Slurm calls {state.reason}"
    if limit is not None:
        default = f"for jobs that count for a limit of its {_PLACES[limit['place']]} to end (Slurm: {state.reason})"
    why = _PENDING_REASONS.get(state.reason.partition(",")[0].strip("()"), default)
    return f"It waits {why}." + (f" Expected start: {state.start}." if state.start[:1].isdigit() else "")


def _slurm_folder(run: Run) -> Path:
    """Folder of the scripts and the output of a run's job; the runs of a sweep share one."""
    launch = LaunchRecord.read(run.launch)
    return (run.folder.with_name(launch.sweep.id) if launch is not None and launch.sweep is not None else run.folder) / "slurm"


def _read_exit_status(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
