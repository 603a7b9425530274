"""The registry of submitted jobs, ``jobs.jsonl`` in the user's state folder: one line per submission."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lockstep.core import UsageError, shell_command
from lockstep.runs import Run

_BLOCK = 65536  # bytes of the registry that are read at once


@dataclass(frozen=True)
class SubmittedJob:
    """A submitted job, one run or a sweep, and the jobs that follow it in a chain.

    Attributes:
        job: Its id.
        folder: Run folder, or folder of the sweep.
        conf: ``SLURM_CONF`` at submission, which identifies the cluster.
        time: Of submission, in seconds since 1970.
        is_recycled: Whether Slurm has given its id to another job since.
        command: What it does: fit, validate, test, predict or export.
        then: The jobs of the chain that follow it, each after the one before has finished.
    """

    job: str
    folder: Path
    name: str
    runs: int
    conf: str
    time: float = 0.0
    is_recycled: bool = False
    command: str = "fit"
    then: tuple["SubmittedJob", ...] = ()

    @property
    def links(self) -> "list[SubmittedJob]":
        """This job, and each that follows it, on its own."""
        return [replace(self, then=()), *self.then]

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
    row = asdict(job) | {"time": time.time()}
    del row["is_recycled"]
    is_last_partial = next(_lines_from_end(path), b"") != b""  # after a full disk
    line = ("\n" if is_last_partial else "") + json.dumps(row, ensure_ascii=False, default=str) + "\n"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as file:
        file.write(line.encode())  # one write: other launchers append too


def registered_jobs(env: Mapping[str, str], newest: int | None = None) -> list[SubmittedJob]:
    """Return the submissions to this cluster from this machine whose folder still exists, oldest first.

    Args:
        newest: Return only so many of the newest, and read no more of the registry.
    """
    return list(islice((job for job in _read_registry(env) if job.folder.is_dir()), newest))[::-1]


def _read_registry(env: Mapping[str, str]) -> Iterator[SubmittedJob]:
    """The submissions to this cluster, newest first."""
    seen: set[str] = set()
    for line in _lines_from_end(_registry_path(env)):
        try:
            job = _read_row(json.loads(line))
        except (ValueError, TypeError, KeyError):  # a partial line, after a full disk
            continue
        if job.conf == env.get("SLURM_CONF", ""):
            then = tuple(replace(link, is_recycled=link.job in seen) for link in job.then)
            yield replace(job, is_recycled=job.job in seen, then=then)
            seen.update(link.job for link in job.links)


def _read_row(row: Mapping[str, Any]) -> SubmittedJob:
    """Build a submission from what ``register_job`` has written."""
    return SubmittedJob(**{**row, "folder": Path(row["folder"]), "then": tuple(map(_read_row, row.get("then", ())))})


def _lines_from_end(path: Path) -> Iterator[bytes]:
    """The lines of a file, last first; an empty one first if the last line is complete."""
    if not path.exists():
        return
    with path.open("rb") as file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start:
            block = min(start, _BLOCK)
            start = file.seek(start - block)
            rest, *lines = (file.read(block) + rest).split(b"\n")
            yield from reversed(lines)
        yield rest


def find_job(name: str | None, env: Mapping[str, str]) -> SubmittedJob:
    """Return the submission with this job id, run id or run folder, with the jobs that follow it; the newest one if None.

    The name may also be that of one run of a sweep, such as ``12_3``.
    """
    if name is None:
        jobs = registered_jobs(env, newest=1)
        if not jobs:
            raise UsageError(f"No job was submitted to this cluster yet; submit one with: {shell_command('submit')}")
        return jobs[0]
    main, _, index = name.partition("_")
    folder = Path(name).absolute()
    for chain in _read_registry(env):
        for place, job in enumerate(chain.links):
            if name in (job.job, job.folder.name) or folder == job.folder:
                return replace(job, then=chain.then[place:])
            if job.runs > 1 and (main == job.job or job.folder.name in name):
                for number, (member, run) in enumerate(job.members):
                    if (main == job.job and index == str(number)) or name == run.id or folder == run.folder:
                        return replace(job, job=member, folder=run.folder, runs=1)
    raise UsageError(
        f"{name}: lockstep has not submitted such a job; to see all jobs: {shell_command('jobs', 'list', '--all')}"
    )


def state_folder(env: Mapping[str, str]) -> Path:
    """The folder in which launchers keep the state of a user."""
    state = env.get("XDG_STATE_HOME") or Path(env.get("HOME") or Path.home()) / ".local" / "state"
    return Path(state) / "lockstep"


def _registry_path(env: Mapping[str, str]) -> Path:
    return state_folder(env) / "jobs.jsonl"
