"""The jobs that were submitted from here, and all that is known of each.

Works without accounting: ``squeue`` knows a job until a few minutes after its end (MinJobAge), the batch script leaves its
exit status in ``slurm/<job>.exit``, and whoever asks while Slurm still knows keeps its answer in ``slurm/<job>.ended.json``.
No torch here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from lockstep.core import atomic_write_json, read_json
from lockstep.runs import ACTIVE, JobState, Run, diagnose, read_attempts
from lockstep.slurm.client import query_jobs
from lockstep.slurm.registry import SubmittedJob


@dataclass(frozen=True)
class RunStatus:
    """All that is known of one run.

    Attributes:
        job: Its job's id.
        run: Its folder.
        exit_status: 0 finished · 1 failed · 2 usage error · 3 waits, runs or unknown · 4 cancelled · 5 over its time limit ·
            6 out of memory · 7 a node failed · 130, 143 interrupted.
        state: One or a few words.
        message: What there is to say about it; may be empty.
        slot: Slurm's word; None if it has forgotten the job.
        progress: ``status.json``.
        result: ``result.json``.
    """

    job: str
    run: Run
    exit_status: int
    state: str
    message: str
    slot: JobState | None
    progress: dict[str, Any]
    result: dict[str, Any]

    @property
    def alive(self) -> bool:
        """Whether it waits or runs, as far as anybody knows."""
        return self.exit_status == ACTIVE

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
        launch = _launch_record(self.run)
        return {
            "job": self.job,
            "run": str(self.run.folder),
            "state": self.state,
            "exit_status": self.exit_status,
            "message": self.message,
            "attempt": self.attempt,
            "attempts": [asdict(attempt) for attempt in read_attempts(self.run)],
            "slurm": asdict(self.slot) if self.slot else None,
            "progress": self.progress,
            "metrics": self.metrics,
            "result": self.result,
            "sweep": launch.get("sweep"),
        }


def mark_cancelled(views: Iterable[RunStatus]) -> None:
    """Remember that these were cancelled: of a run of a sweep that never started, Slurm soon knows nothing any more."""
    for view in views:
        if view.alive and (folder := _slurm_folder(view.run)).is_dir():
            (folder / f"{view.job}.cancelled").touch()


def query_status(jobs: Iterable[SubmittedJob], env: Mapping[str, str]) -> list[RunStatus]:
    """What is known of every run of these submissions, with one question to Slurm."""
    jobs = list(jobs)
    slots, silence = query_jobs({id_ for job in jobs if not job.recycled for id_, _ in job.members}, env)
    return [
        _run_status(id_, run, job, None if job.recycled else slots.get(id_), silence)
        for job in jobs
        for id_, run in job.members
    ]


def _run_status(job: str, run: Run, queued: SubmittedJob, slot: JobState | None, silence: str) -> RunStatus:
    slurm = queued.folder / "slurm" if (queued.folder / "slurm").is_dir() else _slurm_folder(run)
    kept = slurm / f"{job}.ended.json"
    if slot is not None and slot.ended:
        if not kept.exists() and slurm.is_dir():
            atomic_write_json(kept, asdict(slot))
    elif slot is None and (before := read_json(kept)):
        slot = JobState(**before)
    progress, result = read_json(run.status), read_json(run.result)
    known = slot is not None or result.get("status") == "finished" or (slurm / f"{job}.exit").exists()
    if silence and not known:
        status, state, sentence = ACTIVE, "unknown", f"Slurm does not answer: {silence}"
    else:
        status, state, sentence = diagnose(job, run, slurm, slot, result)
    return RunStatus(job, run, status, state, sentence, slot, progress, result)


def _launch_record(run: Run) -> dict[str, Any]:
    return yaml.safe_load(run.launch.read_text()) or {} if run.launch.exists() else {}


def _slurm_folder(run: Run) -> Path:
    """Where the scripts and the output of a run's job are; those of a sweep lie together."""
    sweep = _launch_record(run).get("sweep") or {}
    return (run.folder.with_name(sweep["id"]) if sweep else run.folder) / "slurm"
