"""TensorBoard's event files: their bytes; writers that are killed; then a run that is killed and resumed."""

import logging
from pathlib import Path

import pytest
from support.faults import fault
from support.runs import SMALL, Launch, metric_rows, resume_run
from support.tensorboard_reader import read_events, read_scalars

from lockstep.monitoring.csv_logger import CsvMetricsLogger
from lockstep.monitoring.tensorboard import TensorBoardWriter, encode_event

WRITTEN_BY_TENSORBOARD = (
    "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
    "0d000000000000003c37b83409000000000000f83f3a020801b718825c"
    "2a00000000000000ae8d91f509000000000000024010ac022a1c0a0f0a0876616c2f6c6f7373150000003f0a090a02c3a9150000c07fb78af6e6"
    "1c00000000000000c8c1951d0900000000000002402a110a0f0a0876616c2f6c6f73731500000000314cb625"
)
"""By the RecordWriter of TensorBoard 2.21: version, start of a session, two scalars at step 300 and one at step 0."""


def test_events_are_those_of_tensorboards_own_writer() -> None:
    events = [
        encode_event(1.5, version="brain.Event:2"),
        encode_event(1.5, is_start=True),
        encode_event(2.25, 300, scalars={"val/loss": 0.5, "é": float("nan")}),
        encode_event(2.25, scalars={"val/loss": 0.0}),
    ]
    assert b"".join(events).hex() == WRITTEN_BY_TENSORBOARD


class Rows:
    """``metrics.csv`` of one attempt, and its event file."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self.metrics = CsvMetricsLogger(folder / "metrics.csv", lambda: 10 * self.metrics.row_count)
        self.board = TensorBoardWriter(folder / "tensorboard", folder / "metrics.csv", attempt)

    def close(self) -> None:
        self.board.close()
        self.metrics.close()

    def log(self, **values: float) -> None:
        self.metrics.log_metrics(values)
        self.board.write(self.metrics.row_count, 10 * self.metrics.row_count, values)


def test_an_attempt_takes_over_what_a_killed_one_has_left(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    first = Rows(tmp_path, 1)
    first.log(loss=4.0, epoch=0)
    first.log(loss=2.0, epoch=0)
    (old,) = folder.glob("*tfevents*")
    times = [event.wall_time for event in read_events(old)[2:]]
    old.write_bytes(old.read_bytes()[:-5])  # killed in the middle of an event, which metrics.csv has
    second = Rows(tmp_path, 2)
    second.metrics.resume(1)
    second.log(loss=2.0, epoch=0)  # is repeated
    second.log(loss=1e300, acc=0.5, epoch=1)
    first.log(loss=9.0, epoch=9)  # an older attempt writes to its own file
    first.metrics.close()
    second.close()
    events = read_events(max(folder.iterdir()))
    first.board.close()
    assert (events[0].file_version, events[1].session_log.status) == ("brain.Event:2", 1)
    assert [event.wall_time for event in events[2:4]] == times
    assert read_scalars(folder) == [
        (10, {"loss": 4.0, "epoch": 0.0}),
        (20, {"loss": 2.0, "epoch": 0.0}),
        (30, {"loss": float("inf"), "acc": 0.5, "epoch": 1.0}),
    ]
    Rows(tmp_path, 3).close()
    assert [step for step, _ in read_scalars(folder)] == [10, 20, 30]
    assert sorted(path.name[-7:] for path in folder.iterdir()) == [".000002", ".000003"]


def test_a_full_disk_costs_no_row_and_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(tmp_path, 1)
    rows.log(loss=4.0)

    def full(content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(rows.board, "_append", full)
        rows.log(loss=2.0)
        rows.log(loss=1.0)
    assert caplog.text.count("cannot be written (No space left on device); training continues") == 1
    rows.close()
    assert [step for step, _ in read_scalars(tmp_path / "tensorboard")] == [10, 20, 30]


def test_a_run_that_is_killed_has_the_rows_of_its_metrics_file_once(launch: Launch, tmp_path: Path) -> None:
    killed = launch("--ranks", "2", *SMALL, "--tensorboard", "true", *fault(tmp_path / "once", "SIGKILL", step=27, rank=0))
    assert killed.status != 0
    run = resume_run(launch, killed)
    assert run.status == 0
    found = read_scalars(run.folder / "tensorboard")
    expected = [
        (int(row["step"]), {name for name, text in row.items() if text and name not in ("lockstep/row", "step")})
        for row in metric_rows(run)
    ]
    assert [(step, {name for name in values if not name.startswith("rate/")}) for step, values in found] == expected
    assert [values["train/loss"] for _, values in found if "train/loss" in values] == pytest.approx(run.series("train/loss"))
