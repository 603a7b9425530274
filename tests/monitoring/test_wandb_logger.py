"""The metrics file and W&B's mode; then real offline W&B runs, read back from their files; then real online runs."""

import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from support.faults import fault
from support.forks import run_forked
from support.runs import SMALL, Launch, Outcome
from support.wandb_reader import read_history, read_records
from support.wandb_server import WandbServer

from lockstep import cli
from lockstep.config.schema import WandbOptions
from lockstep.core import World
from lockstep.monitoring.csv_logger import CsvMetricsLogger, read_metrics
from lockstep.monitoring.wandb_logger import start_run_logger, wandb_mode
from lockstep.runs import Ownership, Run


def test_the_metrics_file_gets_new_columns_and_continues_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with closing(CsvMetricsLogger(path, lambda: 1)) as first:
        first.log_metrics({"a": 1.5, "epoch": 0})
    with closing(CsvMetricsLogger(path, lambda: 2)) as second:
        second.log_metrics({"a": 1.5, "epoch": 0})  # the step is repeated
        second.log_metrics({"b": 2.5, "epoch": 1})
    with path.open("a") as file:
        file.write("3,1,")  # killed in the middle of a line
    with closing(CsvMetricsLogger(path, lambda: 3)) as third:
        third.row_count = 2  # as in the checkpoint
        third.log_metrics({"b": 3.5, "epoch": 1})
    assert read_metrics(path) == [
        {"lockstep/row": "1", "step": "1", "epoch": "0", "a": "1.5", "b": ""},
        {"lockstep/row": "2", "step": "2", "epoch": "1", "a": "", "b": "2.5"},
        {"lockstep/row": "3", "step": "3", "epoch": "1", "a": "", "b": "3.5"},
    ]


@pytest.mark.parametrize(
    ("mode", "env", "netrc", "expected"),
    [
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "x" * 40}, "", "online"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "x" * 40}, "", "disabled"),
        ("auto", {}, "machine api.wandb.ai login user password 123", "online"),
        ("auto", {"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login user password 123", "offline"),
        ("auto", {}, "this is not a netrc", "offline"),
        ("offline", {"WANDB_API_KEY": "x" * 40}, "", "offline"),
        ("disabled", {"WANDB_MODE": "online"}, "", "disabled"),
    ],
)
def test_mode_follows_the_config_then_the_environment_then_the_key(
    tmp_path: Path, mode: Any, env: dict[str, str], netrc: str, expected: str
) -> None:
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
    assert wandb_mode(WandbOptions(mode=mode), env | {"HOME": str(tmp_path)}) == expected


def test_online_without_a_key_is_refused_by_the_launcher(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(*SMALL, "--wandb.mode", "online").status == 2
    assert "wandb.mode: online needs an API key, but none is found; set WANDB_API_KEY, or run" in capfd.readouterr().err


def test_online_without_a_key_is_offline_in_a_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = Run.start(tmp_path, "run", ["test"], 1, 1)
    options = WandbOptions(mode="online")
    logger = start_run_logger(run, options, {}, World(), step=lambda: 0, ownership=Ownership(run, 1))
    assert logger.run is not None and logger.run.offline
    assert "W&B has no API key on this machine, so the run is offline; set WANDB_API_KEY" in caplog.text
    assert logger.close(0)


def test_the_config_of_a_resumed_run_is_shown_once_it_trains_with_it(tmp_path: Path) -> None:
    run, _ = Run.start(tmp_path, "run", ["test"], 1, 1)
    options = WandbOptions(mode="offline")
    logger = start_run_logger(run, options, {"lr": 2}, World(), lambda: 0, Ownership(run, 1), shown={"lr": 1})
    assert logger.run is not None and logger.run.config["lr"] == 1
    logger.show_config({"lr": 2})
    assert logger.close(0)
    assert '"lr": 2' in str(read_records(run.folder)).replace("'", '"')


def log_and_die(run: Run) -> None:
    """Log rows of user code as before the publication of a checkpoint; then kill W&B's service and this process at once."""
    logger = start_run_logger(run, WandbOptions(mode="offline"), {}, World(), lambda: 0, Ownership(run, 1))
    service = int(subprocess.check_output(["pgrep", "-P", str(os.getpid()), "wandb-core"]))
    for number in range(4):
        logger.experiment.log({"number": number})
        logger.flush_before_publication()()
    for process in (service, os.getpid()):
        os.kill(process, signal.SIGKILL)


def test_a_published_checkpoint_counts_no_row_that_a_kill_can_lose(tmp_path: Path) -> None:
    run, _ = Run.start(tmp_path, "run", ["test"], 1, 1)
    process = multiprocessing.get_context("fork").Process(target=log_and_die, args=(run,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [row["number"] for row in read_history(run.folder)] == [0, 1, 2, 3]


def test_four_ranks_make_one_wandb_run_with_config_history_and_summary(launch: Launch) -> None:
    tags = ["--wandb.group", "trial", "--wandb.tags", "[small, quick]"]
    run = launch("--nodes", "2", "--ranks", "2", *SMALL, "--wandb.mode", "offline", *tags)
    assert run.status == 0
    assert len(list(run.folder.glob("wandb/*run-*"))) == 1
    records = read_records(run.folder)
    found = {kind: [record[kind] for record in records if record["type"] == kind] for kind in ("run", "history", "exit")}
    (started,) = found["run"]
    assert (started["run_id"], started["run_group"], started["tags"]) == (run.folder.name, "trial", ["small", "quick"])
    config = started["config"]["update"]
    assert config["lockstep"]["world_size"] == 4
    assert len(config["lockstep"]["launch"]["git"]["commit"]) == 40
    assert config["model"]["init_args"]["lr"] == 0.005
    history = [record["item"] for record in found["history"]]
    trained = [row for row in history if "train/loss" in row]
    assert [row["train/loss"] for row in trained] == pytest.approx(run.series("train/loss"))
    assert [row["trainer/global_step"] for row in trained] == [5, 10, 15, 20, 25, 30, 35, 40]
    summary: dict[str, float] = {}
    for row in history:
        summary |= row
    for name, value in run.result["metrics"].items():
        assert summary[name] == pytest.approx(value), name
    assert [record["exit_code"] for record in found["exit"]] == [0]
    for stage, steps in (("val", [20, 40]), ("test", [40])):  # counts of all ranks, once
        rows = [row for row in history if f"{stage}/confusion._type" in row]
        assert [row["trainer/global_step"] for row in rows] == steps
        assert all(row[f"{stage}/samples.count"] == 8 for row in rows)
    (page,) = run.folder.glob("wandb/*run-*/files/media/html/test/*.html")
    counts = [re.findall(r"<td[^>]*>(\d*)</td>", line) for line in page.read_text().split("<tr>")[2:]]
    assert sum(int(count or 0) for row in counts for count in row) == run.result["metrics"]["test/samples"]
    assert sum(int(row[at] or 0) for at, row in enumerate(counts)) == run.result["metrics"]["test/correct"]


def comparable(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what measures time or is drawn at random."""
    changing = ("rate/", "_runtime", "_timestamp", "_wandb")
    return [
        {key: value for key, value in row.items() if not key.startswith(changing) and not key.endswith("artifact_path")}
        for row in history
    ]


CALLS = "--trainer.callbacks+=support.wandb_calls.WandbCalls"


def test_calls_of_user_code_displace_no_row_and_are_not_repeated_by_restarts(launch: Launch, tmp_path: Path) -> None:
    arguments = (
        "--ranks",
        "2",
        *SMALL,
        "--wandb.mode",
        "offline",
        CALLS,
        "--trainer.callbacks.tables",
        "true",
        "--trainer.callbacks.explicit_step",
        "true",
        "--checkpoint.every_n_steps",
        "10",
    )
    whole = launch(*arguments)
    history = comparable(read_history(whole.folder))
    assert [row["train/loss"] for row in history if "train/loss" in row] == pytest.approx(whole.series("train/loss"))
    steps = list(range(1, 41))
    for key in ("image._type", "part", "explicit", "late"):
        assert len([row for row in history if key in row]) == 40, key
    assert [row["trainer/global_step"] for row in history if "image._type" in row] == steps
    assert [row["third"] for row in history if "third" in row] == steps[2::3]
    assert [row["fourth"] for row in history if "fourth" in row] == whole.series("fourth") and len(whole.series("fourth")) == 10
    assert len([row for row in history if "start._type" in row]) == 1
    assert len([row for row in history if "table._type" in row]) >= 2
    killed = launch(*arguments, *fault(tmp_path / "kill", "SIGKILL", step=27), *fault(tmp_path / "term", "SIGTERM", step=33))
    assert killed.status != 0
    assert [launch("--resume", str(killed.folder)).status for _ in range(2)] == [143, 0]
    assert comparable(read_history(killed.folder)) == history


def test_a_failed_run_is_marked_as_failed(launch: Launch) -> None:
    run = launch("--ranks", "2", *SMALL, "--wandb.mode", "offline", "--model.num_classes", "12")
    assert run.status == 2
    assert [record["exit"]["exit_code"] for record in read_records(run.folder) if record["type"] == "exit"] == [1]


def test_disabled_writes_no_wandb_folder(launch: Launch) -> None:
    run = launch(*SMALL, "--wandb.mode", "disabled")
    assert not (run.folder / "wandb").exists()


def test_no_secret_is_written(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "deadbeef" * 5)
    run = launch("--ranks", "2", *SMALL, "--wandb.mode", "offline")
    assert run.status == 0
    for path in run.folder.rglob("*"):
        if path.is_file():
            assert b"deadbeef" * 5 not in path.read_bytes(), path
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["wandb"]["mode"] == "offline"


def test_an_unreachable_server_does_not_end_the_run(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "deadbeef" * 5)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    run = launch(*SMALL, "--wandb.mode", "online")
    assert run.status == 0
    assert any(record["type"] == "history" for record in read_records(run.folder))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A local W&B server for real online runs."""
    with WandbServer() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server


def call_when_paused(paused: Path, act: Callable[[], None]) -> None:
    """Call ``act`` while a run pauses."""

    def wait() -> None:
        while not paused.exists():
            time.sleep(0.01)
        act()
        paused.with_suffix(".over").touch()

    threading.Thread(target=wait, daemon=True).start()


def assert_complete(server: WandbServer, run: Outcome) -> None:
    """Assert that the server has each row of metrics and each image of ``WandbCalls`` once, in order."""
    history, rows = server.history(run.folder.name), read_metrics(run.folder / "metrics.csv")
    assert [row["_step"] for row in history] == list(range(len(history)))
    own = [row for row in history if "lockstep/row" in row]
    assert [row["lockstep/row"] for row in own] == list(range(1, len(rows) + 1))
    assert [row["trainer/global_step"] for row in own] == [int(row["step"]) for row in rows]
    images = [row for row in history if "image" in row]
    assert [row["trainer/global_step"] for row in images] == ([] if not images else list(range(1, 41)))
    assert all(server.files[name] for row in images for name in row["image"]["filenames"])


@pytest.mark.parametrize("what", ["SIGKILL", "SIGTERM"])
def test_attempts_are_one_online_run(launch: Launch, tmp_path: Path, server: WandbServer, what: str) -> None:
    run = launch("--ranks", "2", *SMALL, CALLS, *fault(tmp_path / "once", what, step=27))
    assert run.status != 0
    assert launch("--resume", str(run.folder)).status == 0
    assert_complete(server, run)
    ends = server.ends[run.folder.name]
    assert ends[-1] == {"exitcode": 0}
    assert ({"preempting": True} in ends) == (what == "SIGTERM")


def test_a_server_outage_during_a_run_loses_no_rows(launch: Launch, tmp_path: Path, server: WandbServer) -> None:
    call_when_paused(tmp_path / "once-10", server.go)
    call_when_paused(tmp_path / "once-30", server.come)
    run = launch(*SMALL, *fault(tmp_path / "once-10", "pause", step=10), *fault(tmp_path / "once-30", "pause", step=30))
    assert run.status == 0
    assert_complete(server, run)


def test_a_server_that_starts_late_gets_every_row_at_the_end(
    launch: Launch, tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.go()
    call_when_paused(tmp_path / "once-30", server.come)
    run = launch(*SMALL, *fault(tmp_path / "once-30", "pause", step=30))
    assert run.status == 0
    assert "W&B cannot be reached; the run is offline" in capfd.readouterr().err
    assert_complete(server, run)


@pytest.mark.parametrize("content", ["{", "null", "wandb: null", "wandb: {colour: red}"])
def test_sync_names_a_damaged_config(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(tmp_path, "x")
    run.config.write_text(content)
    assert cli.main(["sync", str(run.folder)]) == 2
    assert f"{run.config} is damaged (" in capsys.readouterr().err


def test_sync_sends_missing_rows_once(
    launch: Launch, tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.go()
    run = launch(*SMALL, CALLS)
    assert run.status == 0
    assert f"wandb sync {run.folder}/wandb/offline-run-*" in capfd.readouterr().err
    server.come()
    for _ in range(2):
        done = run_forked(cli.main, "sync", str(run.folder))
        assert done.returncode == 0 and done.stdout.strip().endswith(run.folder.name)
        assert_complete(server, run)
    server.go()
    done = run_forked(cli.main, "sync", str(run.folder))
    assert (done.returncode, "try again later" in done.stderr) == (1, True)


def test_a_wandb_service_that_dies_at_every_start_does_not_end_the_run(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = wandb.init, []

    def dying(**arguments: Any) -> Any:
        run = real(**arguments)
        calls.append(run)
        subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "wandb-core"], check=len(calls) == 1)
        return run

    monkeypatch.setattr(wandb, "init", dying)
    run = launch(*SMALL, "--wandb.mode", "offline")
    assert (run.status, run.result["status"]) == (0, "finished")


def test_a_wandb_service_that_dies_at_its_first_start_gets_every_row(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = wandb.init, []

    def dying_once(**arguments: Any) -> Any:
        run = real(**arguments)
        calls.append(run)
        if len(calls) == 1:
            subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "wandb-core"], check=True)
        return run

    monkeypatch.setattr(wandb, "init", dying_once)
    run = launch(*SMALL, "--wandb.mode", "offline")
    rows = read_metrics(run.folder / "metrics.csv")
    history = read_history(run.folder)
    assert [row["_step"] for row in history] == list(range(len(history)))
    assert [row["lockstep/row"] for row in history if "lockstep/row" in row] == list(range(1, len(rows) + 1))
