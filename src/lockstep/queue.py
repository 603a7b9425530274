"""The jobs that were submitted from here, and all that is known of each.

Works without accounting: ``squeue`` knows a job until a few minutes after its end (MinJobAge), the batch script leaves its
exit status in ``slurm/<job>.exit``, and whoever asks while Slurm still knows keeps its answer in ``slurm/<job>.ended.json``.
No torch here.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lockstep.disk import read_whole, write_whole
from lockstep.errors import UsageError
from lockstep.failure import attempts
from lockstep.run import Run
from lockstep.squeue import Slot, ask
from lockstep.verdict import ALIVE, verdict


@dataclass(frozen=True)
class Queued:
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


@dataclass(frozen=True)
class View:
    """All that is known of one run.

    Attributes:
        job: Its job's id.
        run: Its folder.
        exit_status: 0 finished · 1 failed · 2 usage error · 3 waits, runs or unknown · 4 cancelled · 5 over its time limit ·
            6 out of memory · 7 a node failed · 130, 143 interrupted.
        state: One or a few words.
        sentence: What there is to say about it; may be empty.
        slot: Slurm's word; None if it has forgotten the job.
        progress: ``status.json``.
        result: ``result.json``.
    """

    job: str
    run: Run
    exit_status: int
    state: str
    sentence: str
    slot: Slot | None
    progress: dict[str, Any]
    result: dict[str, Any]

    @property
    def alive(self) -> bool:
        """Whether it waits or runs, as far as anybody knows."""
        return self.exit_status == ALIVE

    @property
    def attempt(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        return self.run.newest_attempt

    @property
    def metrics(self) -> dict[str, float]:
        """The newest value of every metric."""
        return self.result.get("metrics") or self.progress.get("metrics") or {}

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        launch = _launch(self.run)
        return {
            "job": self.job,
            "run": str(self.run.folder),
            "state": self.state,
            "exit_status": self.exit_status,
            "sentence": self.sentence,
            "attempt": self.attempt,
            "attempts": [asdict(attempt) for attempt in attempts(self.run)],
            "slurm": asdict(self.slot) if self.slot else None,
            "progress": self.progress,
            "metrics": self.metrics,
            "result": self.result,
            "sweep": launch.get("sweep"),
        }


def record(queued: Queued, env: Mapping[str, str]) -> None:
    """Remember a submission, for ``jobs.py``."""
    path = _index(env)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    row = asdict(queued) | {"folder": str(queued.folder), "time": time.time()}
    del row["recycled"]
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b", buffering=0) as file:
        begun = file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"  # by a full disk
        # In one piece: others append too.
        file.write((b"\n" if begun else b"") + (json.dumps(row, ensure_ascii=False) + "\n").encode())


def recorded(env: Mapping[str, str]) -> list[Queued]:
    """All submissions to this cluster from this machine whose folder is still there, oldest first."""
    return [job for job in _all_recorded(env) if job.folder.is_dir()]


def _all_recorded(env: Mapping[str, str]) -> list[Queued]:
    path = _index(env)
    here: list[Queued] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            job = Queued(**row | {"folder": Path(row["folder"])})
        except (ValueError, TypeError, KeyError):  # half a line, which a full disk has left
            continue
        if job.conf == env.get("SLURM_CONF", ""):
            here.append(job)
    owners = {job.job: job for job in here}
    return [replace(job, recycled=owners[job.job] is not job) for job in here]


def find(which: str | None, env: Mapping[str, str]) -> Queued:
    """The submission called ``which``: a job's id, that of one run of a sweep, or a run folder; the last one if None.

    Raises:
        UsageError: There is none.
    """
    jobs = _all_recorded(env) if which else recorded(env)
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


def mark_cancelled(views: Iterable[View]) -> None:
    """Remember that these were cancelled: of a run of a sweep that never started, Slurm soon knows nothing any more."""
    for view in views:
        if view.alive and (folder := _slurm_folder(view.run)).is_dir():
            (folder / f"{view.job}.cancelled").touch()


def look(jobs: Iterable[Queued], env: Mapping[str, str]) -> list[View]:
    """What is known of every run of these submissions, with one question to Slurm."""
    jobs = list(jobs)
    slots, silence = ask({id_ for job in jobs if not job.recycled for id_, _ in job.members}, env)
    return [_view(id_, run, job, None if job.recycled else slots.get(id_), silence) for job in jobs for id_, run in job.members]


def _view(job: str, run: Run, queued: Queued, slot: Slot | None, silence: str) -> View:
    slurm = queued.folder / "slurm" if (queued.folder / "slurm").is_dir() else _slurm_folder(run)
    kept = slurm / f"{job}.ended.json"
    if slot is not None and slot.ended:
        if not kept.exists() and slurm.is_dir():
            write_whole(kept, asdict(slot))
    elif slot is None and (before := read_whole(kept)):
        slot = Slot(**before)
    progress, result = read_whole(run.status), read_whole(run.result)
    known = slot is not None or result.get("status") == "finished" or (slurm / f"{job}.exit").exists()
    if silence and not known:
        status, state, sentence = ALIVE, "unknown", f"Slurm does not answer: {silence}"
    else:
        status, state, sentence = verdict(job, run, slurm, slot, result)
    return View(job, run, status, state, sentence, slot, progress, result)


def _launch(run: Run) -> dict[str, Any]:
    return yaml.safe_load(run.launch.read_text()) or {} if run.launch.exists() else {}


def _slurm_folder(run: Run) -> Path:
    """Where the scripts and the output of a run's job are; those of a sweep lie together."""
    sweep = _launch(run).get("sweep") or {}
    return (run.folder.with_name(sweep["id"]) if sweep else run.folder) / "slurm"


def _index(env: Mapping[str, str]) -> Path:
    state = env.get("XDG_STATE_HOME") or Path(env.get("HOME") or Path.home()) / ".local" / "state"
    return Path(state) / "lockstep" / "jobs.jsonl"
