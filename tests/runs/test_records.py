"""Records of a run folder are read back, and a damaged file is named and ignored; files alone."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep import __version__
from lockstep.runs import (
    Attempt,
    Durations,
    Failure,
    LaunchRecord,
    Owner,
    Run,
    RunProgress,
    RunResult,
    SweepRun,
    append_attempt,
    git_state,
    lockstep_state,
    read_attempts,
    record_earlier_attempts,
    record_failure,
    typed_command,
    write_failed_result,
)
from lockstep.runs.records import GitState, SoftwareState


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    result = RunResult("failed", "fit", 4, 2, ["SIGTERM"], "rank 1: no", 1, 12, 1, Durations(1.5, 2.0, 0.0), {"val/loss": 0.5})
    result.write(tmp_path / "result.json")
    assert RunResult.read(tmp_path / "result.json") == result
    sweep = SweepRun("x", 0, {"model.lr": "1e-3"})
    states = GitState("c0ffee", changed=True), SoftwareState("0.1.0")
    launch = LaunchRecord("python launch/slurm.py --nodes 2-4", "2-4", 1, *states, sweep=sweep)
    launch.write(tmp_path / "launch.yaml")
    assert LaunchRecord.read(tmp_path / "launch.yaml") == launch and launch.max_nodes == 4


def test_fields_that_are_none_are_not_written_and_unknown_ones_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_text('{"job": "7", "colour": "red"}')
    assert Owner.read(tmp_path / "owner.json") == Owner(job="7")
    (tmp_path / "result.json").write_text('{"status": "failed", "seconds": {"training": 2.0, "idle": 1.0}}')
    assert RunResult.read(tmp_path / "result.json") == RunResult("failed", seconds=Durations(training=2.0))
    assert "job" not in Owner(host="a", pid=3).as_dict() and str(Owner(job="7")) == "job 7"


@pytest.mark.parametrize("text", ["", '{"step": 1', "[]", "7", '{"step": 3}'])
def test_a_damaged_record_is_named_and_ignored(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "status.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "lockstep"):
        assert RunProgress.read(path) is None
    assert f"{path} is damaged and ignored" in caplog.text


def test_a_missing_record_is_none_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert RunProgress.read(tmp_path / "status.json") is None and LaunchRecord.read(tmp_path / "launch.yaml") is None
    assert not caplog.text


SCRIPT = ["python", "launch/local.py", "--model.lr", "1e-3"]


@pytest.mark.parametrize(
    ("command", "process", "expected"),
    [
        (
            SCRIPT,
            ["/venv/bin/python", "../l/launch/local.py", *SCRIPT[2:]],
            "/venv/bin/python ../l/launch/local.py --model.lr 1e-3",
        ),
        (SCRIPT[:2], ["python3.12", "local.py"], "python3.12 local.py"),
        (
            ["lockstep", "local", "--a", "b c"],
            ["/v/python", "/v/lockstep", "local", "--a", "b c"],
            "/v/lockstep local --a 'b c'",
        ),
        (["lockstep", "local"], ["python", "-m", "lockstep.cli", "local"], "python -m lockstep.cli local"),
        (SCRIPT, ["python", "-m", "ipykernel_launcher", "-f", "kernel.json"], "python launch/local.py --model.lr 1e-3"),
        (["test"], ["python", "-m", "pytest"], "test"),
        (["lockstep", "local", "--u", "https://me:pw@host/x"], ["python"], "lockstep local --u '***'"),
    ],
)
def test_the_launch_record_has_what_was_typed_without_secrets(command: list[str], process: list[str], expected: str) -> None:
    assert typed_command(command, process) == expected


def test_the_launch_record_names_version_and_commit_of_lockstep(tmp_path: Path) -> None:
    run, _ = Run.start(tmp_path, "x", ["test"], 1, 1)
    launch = LaunchRecord.read(run.launch)
    assert launch is not None and launch.lockstep == lockstep_state()
    assert launch.lockstep.version == __version__ and len(launch.lockstep.commit or "") == 40
    assert launch.interpreter == sys.executable and launch.folder == str(Path.cwd())


def test_the_state_of_a_checkout_does_not_depend_on_its_file_names(tmp_path: Path) -> None:
    for command in (
        ["init"],
        ["config", "core.quotePath", "false"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "first"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
    (tmp_path / os.fsdecode(b"\xff")).write_text("")
    state = git_state(tmp_path)
    assert state is not None and state.changed


def test_local_attempts_are_recorded_by_the_next_one_with_their_reasons(tmp_path: Path) -> None:
    run, first = Run.start(tmp_path, "x", ["test"], 1, 1)
    RunResult("interrupted", attempts=first, reason="Ctrl-C", exit_status=130).write(run.result)
    second = run.claim_attempt(Owner(host="a", pid=1))
    record_failure(run, second, Failure(0, 1, 0, "", "ValueError: no"))
    third = run.claim_attempt(Owner(host="a", pid=1))  # killed
    fourth = run.claim_attempt(Owner(host="a", pid=1))
    for _ in range(2):
        record_earlier_attempts(run, fourth)
    attempts = read_attempts(run)
    assert [(found.attempt, found.crashed) for found in attempts] == [(first, False), (second, True), (third, True)]
    assert [found.reason for found in attempts[:2]] == ["Ctrl-C", "ValueError: no"]
    assert attempts[2].reason.startswith("It ended without a report")


def test_a_partial_line_that_a_kill_has_left_costs_no_further_attempt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run.create(tmp_path, "x")
    first, second = (Attempt(number, "7", "", 0, 0.0, 1.0, 0, 0, False) for number in (1, 2))
    append_attempt(run, first)
    with (run.folder / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": 2, "jo')
    append_attempt(run, second)
    assert read_attempts(run) == [first, second] and "line 2 of" in caplog.text


def test_the_result_of_a_failed_attempt_is_its_own(tmp_path: Path) -> None:
    """Rank zero of the second attempt has had no time to write one."""
    run, first = Run.start(tmp_path, "x", ["test"], 1, 1)
    RunResult("interrupted", attempts=first, reason="Ctrl-C", exit_status=130, metrics={"loss": 1.0}).write(run.result)
    for failure, status in (
        (Failure(0, 1, 0, "", "ValueError: no"), "failed"),
        (Failure(0, 1, 0, "", "it was ended by SIGTERM.", 143), "interrupted"),
    ):
        attempt = run.claim_attempt(Owner(host="a", pid=1))
        write_failed_result(run, attempt, failure)
        result = run.result_of(attempt)
        assert result is not None and result.status == status and result.reason == failure.reason and not result.metrics


def test_failures_that_one_rank_records_at_once_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its watchdog and its main thread, for example: the second records while the first has its temporary file."""
    run, attempt = Run.start(tmp_path, "x", ["test"], 1, 1)
    hangs, raises = Failure(0, 1, 0, "", "No progress."), Failure(0, 1, 0, "", "ValueError: no")
    link = os.link

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        assert record_failure(run, attempt, raises) == raises
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert record_failure(run, attempt, hangs) == raises


def test_a_failure_that_cannot_be_recorded_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, attempt = Run.start(tmp_path, "x", ["test"], 1, 1)
    failure = Failure(0, 1, 0, "", "ValueError: no")

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lockstep.runs.records.atomic_write_json", full)
    assert record_failure(run, attempt, failure) == failure
    write_failed_result(run, attempt, failure)
    assert "cannot be written (No space left on device): ValueError: no" in capsys.readouterr().err
