"""The status of jobs that Slurm no longer knows, from files of the run folder alone."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.core.files import atomic_write_json
from lockstep.runs.failure import Failure, record_failure
from lockstep.runs.records import Owner, RunResult
from lockstep.runs.run import Run
from lockstep.slurm import registry
from lockstep.slurm.follow import _RankLog, follow
from lockstep.slurm.registry import SubmittedJob, find_job, register_job, registered_jobs
from lockstep.slurm.status import ACTIVE, RunStatus, mark_cancelled, query_status


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A login shell without Slurm's commands."""
    return {"HOME": str(tmp_path), "PATH": ""}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that has begun."""
    made = Run.create(tmp_path / "runs", "x")
    (made.folder / "slurm").mkdir()
    made.claim_attempt(Owner(job="7"))
    return made


def seen(run: Run, env: dict[str, str]) -> RunStatus:
    """The run as job 7."""
    (view,) = query_status([SubmittedJob("7", run.folder, "x", 1, "")], env)
    return view


def ended(run: Run, status: int, output: str = "") -> None:
    """What the batch script leaves."""
    (run.folder / "slurm/7.exit").write_text(f"{status}\n")
    (run.folder / "slurm/7_0_log.out").write_text(output)


@pytest.mark.parametrize(("status", "told"), [(1, 1), (2, 2), (3, 1), (4, 1), (7, 1), (143, 143)])
def test_what_a_script_ends_with_is_not_taken_for_a_word_of_slurms(
    run: Run, env: dict[str, str], status: int, told: int
) -> None:
    ended(run, status, "nvidia-smi: no devices\n")
    view = seen(run, env)
    assert (view.exit_status, view.state, view.is_active) == (told, "failed", False)
    assert "nvidia-smi: no devices" in view.message


def test_a_job_that_a_signal_ended_may_have_been_requeued_while_slurm_does_not_answer(
    run: Run, env: dict[str, str], tmp_path: Path
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'squeue: error: Unable to contact slurm controller (connect failure)' >&2; exit 1\n")
    squeue.chmod(0o755)
    env["PATH"] = str(tmp_path)
    ended(run, 143)
    view = seen(run, env)
    assert (view.exit_status, view.state) == (ACTIVE, "unknown")
    assert "connect failure" in view.message and "ended by SIGTERM, and may have been requeued" in view.message
    mark_cancelled([view])
    assert (seen(run, env).exit_status, seen(run, env).state) == (4, "cancelled")
    (run.folder / "slurm/7.cancelled").unlink()
    ended(run, 1)
    assert (seen(run, env).exit_status, seen(run, env).state) == (1, "failed")


def test_a_job_that_was_refused_does_not_end_as_the_attempt_of_another_job(run: Run, env: dict[str, str]) -> None:
    run.claim_attempt(Owner(job="8"))
    RunResult("interrupted", attempts=1, reason="SIGTERM", exit_status=143).write(run.result)
    ended(run, 2, "lockstep: The run is being trained by job 8; end that first.\n")
    view = seen(run, env)
    assert view.exit_status == 2 and "is being trained by job 8" in view.message


def test_a_character_that_is_half_written_is_shown_whole(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Größe".encode()
    log = _RankLog(run, 0, 0, 0)
    for part in (text[:3], text[3:]):
        with run.log(1).open("ab") as file:
            file.write(part)
        log.print_news()
    assert capsys.readouterr().out == "Größe"


def test_a_full_disk_does_not_hide_that_a_job_is_cancelled(
    run: Run, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    active = replace(seen(run, env), exit_status=ACTIVE)
    monkeypatch.setattr(Path, "touch", refuse)
    mark_cancelled([active])
    monkeypatch.undo()
    mark_cancelled([active])
    assert (run.folder / "slurm/7.cancelled").exists()


def test_the_first_failure_is_told(run: Run, env: dict[str, str]) -> None:
    ended(run, 3)
    record_failure(run, 1, Failure(1, 2, 1, "b", "it was ended by exit status 3.", 3))
    view = seen(run, env)
    assert (view.exit_status, view.message) == (1, "rank 1 (node 1, b): it was ended by exit status 3.")


@pytest.mark.parametrize(("words", "status"), [("TIME LIMIT", 5), ("NODE FAILURE", 7), ("PREEMPTION", 7)])
def test_what_slurm_did_is_known_after_it_has_forgotten_it(run: Run, env: dict[str, str], words: str, status: int) -> None:
    ended(run, 143, f"slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO {words} ***\n")
    record_failure(run, 1, Failure(0, 2, 0, "a", "it was ended by SIGTERM.", 143))
    assert seen(run, env).exit_status == status


def test_a_finished_run_is_finished(run: Run, env: dict[str, str]) -> None:
    ended(run, 0)
    atomic_write_json(run.result, {"status": "finished", "attempts": 1})
    assert (seen(run, env).exit_status, seen(run, env).state) == (0, "finished")


def test_an_id_belongs_to_the_job_that_has_it_last(tmp_path: Path, env: dict[str, str]) -> None:
    runs = [Run.create(tmp_path / "runs", "x") for _ in range(2)]
    for run in runs:
        register_job(SubmittedJob("1", run.folder, "x", 1, ""), env)
    register_job(SubmittedJob("2", tmp_path / "gone", "x", 1, ""), env)
    assert [(job.folder, job.is_recycled) for job in registered_jobs(env)] == [(runs[0].folder, True), (runs[1].folder, False)]
    assert find_job("1", env).folder == runs[1].folder and find_job(str(runs[0].folder), env).is_recycled


@pytest.mark.parametrize("block", [7, 65536])
def test_the_newest_jobs_are_found_without_reading_all(
    tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(registry, "_BLOCK", block)
    folders = [Run.create(tmp_path / "runs", "x").folder for _ in range(5)]
    for number, folder in enumerate(folders):
        register_job(SubmittedJob(str(number), folder, "x", 1, ""), env)
    path = tmp_path / ".local/state/lockstep/jobs.jsonl"
    path.write_bytes(path.read_bytes()[:-1])  # a partial line, as a full disk leaves one
    register_job(SubmittedJob("5", folders[0], "x", 1, ""), env)
    assert [job.job for job in registered_jobs(env)] == [str(number) for number in range(6)]
    assert path.read_bytes().count(b"\n") == 6

    looked_at: list[str] = []

    def is_dir(folder: Path) -> bool:
        looked_at.append(folder.name)
        return True

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert [job.job for job in registered_jobs(env, newest=2)] == ["4", "5"]
    assert looked_at == [folders[0].name, folders[4].name]
    assert find_job(None, env).job == "5"


def test_a_run_of_a_sweep_is_found_by_its_folder(tmp_path: Path, env: dict[str, str]) -> None:
    sweep = Run.create(tmp_path / "runs", "x")
    register_job(SubmittedJob("9", sweep.folder, "x", 2, ""), env)
    member = sweep.folder.with_name(f"{sweep.id}-001")
    found = find_job(str(member), env)
    assert (found.job, found.folder, found.runs) == ("9_1", member, 1)
    assert json.loads((tmp_path / ".local/state/lockstep/jobs.jsonl").read_text())["runs"] == 2


def test_what_the_batch_script_tries_again_is_in_the_status(run: Run, tmp_path: Path) -> None:
    (tmp_path / "squeue").write_text("#!/bin/sh\necho '7|7|N/A|RUNNING|None|N/A|0:01|1:00|n1|0|0|'\n")
    (tmp_path / "squeue").chmod(0o755)
    (run.folder / "slurm/7.retry").write_text("scontrol requeue fails; tried 3 of 60 times.\n")
    view = seen(run, {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (view.state, view.message) == ("running", "scontrol requeue fails; tried 3 of 60 times.")


def test_a_state_that_cannot_be_written_is_shown(run: Run, tmp_path: Path) -> None:
    """As on a full disk."""
    (tmp_path / "squeue").write_text("#!/bin/sh\necho '7|7|N/A|TIMEOUT|TimeLimit|N/A|0:01|1:00|n1|0|0|'\n")
    (tmp_path / "squeue").chmod(0o755)
    (run.folder / f"slurm/.7.ended.json.{os.getpid()}").mkdir()  # in place of the temporary file
    assert seen(run, {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}).state == "over its time limit"


def test_a_followed_log_continues_where_it_was_printed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if lines were written after that, before it is followed."""
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    (tmp_path / "squeue").write_text("#!/bin/sh\necho '7|7|N/A|COMPLETED|None|N/A|0:01|1:00|n1|0|0|'\n")
    (tmp_path / "squeue").chmod(0o755)
    log = run.log(1, 0)
    log.write_text("one\ntwo\n")
    follow(SubmittedJob("7", run.folder, "x", 1, ""), env, printed=(1, 4))
    assert capsys.readouterr().out.startswith("two\njob 7: ")


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "QOSMaxWallDurationPerJobLimit",
            "It will never start: its QOS does not allow a job of this size or time limit (Slurm: Q",
        ),
        ("AssocMaxCpuPerJobLimit", "It will never start: its account does not allow a job of this size"),
        ("AssocGrpNodeLimit", "It waits for jobs that count for a limit of its account to end (Slurm: AssocGrpNodeLimit)."),
        ("QOSMaxCpuPerUserLimit", "It waits for jobs that count for a limit of its QOS to end"),
        ("QOSMaxJobsPerUserLimit", "It waits for one of your jobs to end (limit of the QOS)."),
        ("PartitionTimeLimit", "It will never start: it asks for more time than its partition gives"),
        ("Priority", "It waits behind jobs of higher priority."),
        ("QOSNotAllowed", "It waits for what Slurm calls QOSNotAllowed."),
        ("Licenses", "It waits for what Slurm calls Licenses."),
    ],
)
def test_what_a_job_waits_for_is_told(run: Run, tmp_path: Path, reason: str, message: str) -> None:
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '7|7|N/A|PENDING|{reason}|N/A|0:00|1:00||0|0|'\n")
    (tmp_path / "squeue").chmod(0o755)
    assert seen(run, {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}).message.startswith(message)
