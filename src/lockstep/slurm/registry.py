"""The jobs that were submitted from here, and all that is known of each.

Works without accounting: ``squeue`` knows a job until a few minutes after its end (MinJobAge), the batch script leaves its
exit status in ``slurm/<job>.exit``, and whoever asks while Slurm still knows keeps its answer in ``slurm/<job>.ended.json``.
No torch here.
"""

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
    """A job that was submitted: one run, or a sweep.

    Attributes:
        job: Its id.
        folder: Run folder, or folder of the sweep.
        name: Name of the job.
        runs: Number of runs.
        conf: ``SLURM_CONF`` at submission: which cluster it was.
        time: Of submission, in seconds since 1970.
        recycled: Whether Slurm has given its id to another job since.
    """

    job: str
    folder: Path
    name: str
    runs: int
    conf: str
    time: float = 0.0
    recycled: bool = False

    @property
    def members(self) -> list[tuple[str, Run]]:
        """Id and folder of every run."""
        if self.runs == 1:
            return [(self.job, Run(self.folder))]
        digits = max(3, len(str(self.runs - 1)))
        return [
            (f"{self.job}_{index}", Run(self.folder.with_name(f"{self.folder.name}-{index:0{digits}}")))
            for index in range(self.runs)
        ]


def register_job(queued: SubmittedJob, env: Mapping[str, str]) -> None:
    """Remember a submission, for ``jobs.py``."""
    path = _registry_path(env)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    row = asdict(queued) | {"folder": str(queued.folder), "time": time.time()}
    del row["recycled"]
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b", buffering=0) as file:
        begun = file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"  # by a full disk
        # In one piece: others append too.
        file.write((b"\n" if begun else b"") + (json.dumps(row, ensure_ascii=False) + "\n").encode())


def registered_jobs(env: Mapping[str, str]) -> list[SubmittedJob]:
    """All submissions to this cluster from this machine whose folder is still there, oldest first."""
    return [job for job in _read_registry(env) if job.folder.is_dir()]


def _read_registry(env: Mapping[str, str]) -> list[SubmittedJob]:
    path = _registry_path(env)
    here: list[SubmittedJob] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            job = SubmittedJob(**row | {"folder": Path(row["folder"])})
        except (ValueError, TypeError, KeyError):  # half a line, which a full disk has left
            continue
        if job.conf == env.get("SLURM_CONF", ""):
            here.append(job)
    owners = {job.job: job for job in here}
    return [replace(job, recycled=owners[job.job] is not job) for job in here]


def find_job(which: str | None, env: Mapping[str, str]) -> SubmittedJob:
    """The submission called ``which``: a job's id, that of one run of a sweep, or a run folder; the last one if None.

    Raises:
        UsageError: There is none.
    """
    jobs = _read_registry(env) if which else registered_jobs(env)
    if which is None:
        if not jobs:
            raise UsageError("No job was submitted to this cluster yet; launch/slurm.py does it.")
        return jobs[-1]
    main, _, index = which.partition("_")
    folder = Path(which).absolute()
    for job in reversed(jobs):
        if which == job.job or folder == job.folder:
            return job
        if main == job.job or folder.parent == job.folder.parent:
            for number, (member, run) in enumerate(job.members if job.runs > 1 else []):
                if index == str(number) or folder == run.folder:
                    return replace(job, job=member, folder=run.folder, runs=1)
    raise UsageError(f"{which}: no such job was submitted with lockstep; jobs.py list shows those that were.")


def _registry_path(env: Mapping[str, str]) -> Path:
    state = env.get("XDG_STATE_HOME") or Path(env.get("HOME") or Path.home()) / ".local" / "state"
    return Path(state) / "lockstep" / "jobs.jsonl"
