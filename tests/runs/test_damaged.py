"""Damaged files of a run folder are named, and stop nothing that does not need them."""

from pathlib import Path

import pytest

from lockstep.runs.attempts import Attempt, append_attempt
from lockstep.runs.failure import Failure
from lockstep.runs.records import AttemptStart, LaunchRecord, Owner, RunProgress, RunResult
from lockstep.runs.run import Run
from lockstep.slurm.registry import SubmittedJob, find_job, register_job, registered_jobs
from lockstep.slurm.status import query_status

FILES = {
    "status.json": RunProgress("training"),
    "result.json": RunResult("finished"),
    "launch.yaml": LaunchRecord("x", 1, 1),
    "owner.json": Owner(job="7"),
    "logs/1/start.json": AttemptStart("7", 0.0),
    "logs/1/failure.json": Failure(0, 1, 0, "", "It failed."),
}
DAMAGES = [b"", b"{", b"\0" * 100, b"\xff\xfe", b"null", b"[1]", b"7", b'"text"']


@pytest.fixture
def jobs(tmp_path: Path) -> dict[str, str]:
    """The environment of a user with two runs; the first has a file of every kind."""
    env = {"HOME": str(tmp_path), "PATH": ""}
    for job in ("7", "8"):
        run = Run.create(tmp_path / "runs", "x")
        register_job(SubmittedJob(job, run.folder, "x", 1, ""), env)
        if job == "7":
            run.log(1, 0)
            append_attempt(run, Attempt(1, "7", "", 0, 0.0, 1.0, 0, 0, False))
            for name, record in FILES.items():
                record.write(run.folder / name)
    return env


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "attempts.jsonl"])
def test_all_jobs_are_listed_and_a_run_can_be_claimed(jobs: dict[str, str], name: str, damage: bytes) -> None:
    run = Run(registered_jobs(jobs)[0].folder)
    (run.folder / name).write_bytes(damage)
    statuses = query_status(registered_jobs(jobs), jobs)
    assert [status.job for status in statuses] == ["7", "8"]
    assert all(status.as_dict()["job"] for status in statuses)
    assert run.claim_attempt(Owner(job="7")) == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_of_the_registry_hides_no_other_job(jobs: dict[str, str], damage: bytes) -> None:
    with (Path(jobs["HOME"]) / ".local/state/lockstep/jobs.jsonl").open("ab") as file:
        file.write(damage)
    register_job(SubmittedJob("9", registered_jobs(jobs)[0].folder, "x", 1, ""), jobs)
    assert [job.job for job in registered_jobs(jobs)] == ["7", "8", "9"]
    assert find_job("8", jobs).job == "8"
