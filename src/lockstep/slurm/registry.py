"""The registry of submitted jobs, ``jobs.jsonl`` in the user's state folder: one line per submission."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lockstep.core import UsageError
from lockstep.runs import Run


@dataclass(frozen=True)
class SubmittedJob:
    """A submitted job: one run, or a sweep.

    Attributes:
        job: Its id.
        folder: Run folder, or folder of the sweep.
        conf: ``SLURM_CONF`` at submission, which identifies the cluster.
        time: Of submission, in seconds since 1970.
        is_recycled: Whether Slurm has given its id to another job since.
    """

    job: str
    folder: Path
    name: str
    runs: int
    conf: str
    time: float = 0.0
    is_recycled: bool = False

    @property
    def members(self) -> list[tuple[str, Run]]:
        """Job id and folder of every run."""
        names = [self.job] if self.runs == 1 else [f"{self.job}_{index}" for index in range(self.runs)]
        return list(zip(names, member_runs(self.folder, self.runs), strict=True))


def member_runs(folder: Path, count: int) -> list[Run]:
    """The runs of a submission: that in ``folder``, or those of a sweep, which are siblings of the sweep's folder."""
    digits = max(3, len(str(count - 1)))
    return [Run(folder if count == 1 else folder.with_name(f"{folder.name}-{index:0{digits}}")) for index in range(count)]


def register_job(job: SubmittedJob, env: Mapping[str, str]) -> None:
    """Add a submission to the registry."""
    path = _registry_path(env)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    row = asdict(job) | {"folder": str(job.folder), "time": time.time()}
    del row["is_recycled"]
    is_partial = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # after a full disk
    line = ("\n" if is_partial else "") + json.dumps(row, ensure_ascii=False) + "\n"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as file:
        file.write(line.encode())  # one write: other launchers append too


def registered_jobs(env: Mapping[str, str]) -> list[SubmittedJob]:
    """Return all submissions to this cluster from this machine whose folder still exists, oldest first."""
    return [job for job in _read_registry(env) if job.folder.is_dir()]


def _read_registry(env: Mapping[str, str]) -> list[SubmittedJob]:
    path = _registry_path(env)
    found: list[SubmittedJob] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            job = SubmittedJob(**row | {"folder": Path(row["folder"])})
        except (ValueError, TypeError, KeyError):  # a partial line, after a full disk
            continue
        if job.conf == env.get("SLURM_CONF", ""):
            found.append(job)
    newest = {job.job: job for job in found}
    return [replace(job, is_recycled=newest[job.job] is not job) for job in found]


def find_job(name: str | None, env: Mapping[str, str]) -> SubmittedJob:
    """Return the submission with this job id, run id of a sweep, or run folder; the newest one if None."""
    if name is None:
        jobs = registered_jobs(env)
        if not jobs:
            raise UsageError("No job was submitted to this cluster yet; submit one with launch/slurm.py.")
        return jobs[-1]
    main, _, index = name.partition("_")
    folder = Path(name).absolute()
    for job in reversed(_read_registry(env)):
        if name == job.job or folder == job.folder:
            return job
        if main == job.job or folder.parent == job.folder.parent:
            for number, (member, run) in enumerate(job.members if job.runs > 1 else []):
                if index == str(number) or folder == run.folder:
                    return replace(job, job=member, folder=run.folder, runs=1)
    raise UsageError(f"{name}: lockstep has not submitted such a job; jobs.py list shows all jobs.")


def _registry_path(env: Mapping[str, str]) -> Path:
    state = env.get("XDG_STATE_HOME") or Path(env.get("HOME") or Path.home()) / ".local" / "state"
    return Path(state) / "lockstep" / "jobs.jsonl"
