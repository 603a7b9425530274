"""One file for all attempts: damaged or shortened ones, older attempts that write, and what a row costs; one run."""

import logging
from contextlib import closing
from pathlib import Path

import pytest
from support.runs import REPO, Launch, resume_run

from lockstep.core import Superseded
from lockstep.monitoring.csv_logger import METRICS_ROW, CsvMetricsLogger, read_metrics
from lockstep.runs import Owner, Ownership, Run


def resume(path: Path, row_count: int) -> list[str]:
    """Resume after ``row_count`` rows, log one more, and return the steps that the file has then."""
    with closing(CsvMetricsLogger(path, lambda: row_count + 1)) as logger:
        logger.resume(row_count)
        logger.log_metrics({"loss": 0.5})
        logger.flush()
    return [row["step"] for row in read_metrics(path)]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\n\xff\n",
        b"lockstep/row,step\n1,a\n",
        b"step\n1\n",
        b"lockstep/row,step\n1,5,3\n",
        b"lockstep/row,step\n2,1\n2,1\n",
    ],
)
def test_a_damaged_file_is_named_and_kept_aside(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "lockstep"):
        assert resume(path, 1) == ["2"]
    assert f"{path} is damaged" in caplog.text and "has 0 of the 1 rows before the checkpoint" in caplog.text
    assert path.with_name("metrics.csv.damaged").read_bytes() == content


def test_lost_rows_are_counted_and_an_intact_file_is_resumed_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("lockstep/row,step,epoch,loss\n1,1,0,0.5\n2,2,0,nan\n")
    with caplog.at_level(logging.WARNING, "lockstep"):
        assert resume(path, 2) == ["1", "2", "3"]
        assert not caplog.text
        assert resume(path, 5) == ["1", "2", "3", "6"]
    assert f"{path} has 3 of the 5 rows before the checkpoint" in caplog.text


def test_rows_after_lost_ones_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert resume(path, 5) == ["6"]  # the first five are lost
    steps = iter((6, 7))
    with closing(CsvMetricsLogger(path, lambda: next(steps))) as logger:
        logger.resume(5)
        for loss in (0.5, 0.25):  # row 6 is repeated
            logger.log_metrics({"loss": loss})
        assert [row[METRICS_ROW] for row in read_metrics(path)] == ["6", "7"]
        assert [row[METRICS_ROW] for row in logger.rows_after(6)] == ["7"]


def test_a_finished_run_that_trains_on_keeps_the_row_of_its_test_and_loses_none(launch: Launch) -> None:
    arguments = ("--config", str(REPO / "configs/digits.yaml"), "--ranks", "2", "--trainer.log_every_n_steps", "10")
    run = launch(*arguments, "--trainer.max_epochs", "1")
    first = read_metrics(run.folder / "metrics.csv")
    assert [row["step"] for row in first] == ["10", "20", "20", "20"]
    assert first[-1]["test/accuracy"]
    assert resume_run(launch, run, "--trainer.max_epochs", "2").status == 0
    rows = read_metrics(run.folder / "metrics.csv")
    assert rows[:4] == [row | {name: "" for name in rows[0] if name not in row} for row in first]
    assert [row["step"] for row in rows[4:]] == ["30", "40", "40", "40"]
    assert [int(row[METRICS_ROW]) for row in rows] == list(range(1, 9))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose first attempt has claimed it."""
    run = Run.create(tmp_path, "x")
    run.claim_attempt(Owner(job="7"))
    return run


def attempt(run: Run, number: int) -> CsvMetricsLogger:
    """The file as an attempt writes it."""
    return CsvMetricsLogger(run.metrics, lambda: 1, Ownership(run, number).check_now)


def test_what_an_older_attempt_still_writes_is_not_in_the_file(run: Run) -> None:
    with closing(attempt(run, 1)) as old:
        old.log_metrics({"loss": 0.5})
        run.claim_attempt(Owner(job="8"))
        old.log_metrics({"loss": 0.25})
        with closing(attempt(run, 2)) as new:
            new.resume(1)
            for _ in range(3):
                old.log_metrics({"loss": 0.0})
                new.log_metrics({"loss": 0.125})
            with pytest.raises(Superseded):
                old.log_metrics({"accuracy": 1.0})  # a new column replaces the file
            rows = [(row[METRICS_ROW], row["loss"]) for row in read_metrics(run.metrics)]
    assert rows == [("1", "0.5"), ("2", "0.25"), ("3", "0.125"), ("4", "0.125")]
    assert not list(run.folder.glob(".metrics*"))


def test_a_row_is_written_without_a_look_into_the_folder(run: Run) -> None:
    with closing(attempt(run, 1)) as logger:
        logger.log_metrics({"loss": 0.5})
        aside = run.folder.rename(run.folder.with_name("aside"))
        for _ in range(3):
            logger.log_metrics({"loss": 0.5})
        aside.rename(run.folder)
    assert len(read_metrics(run.metrics)) == 4


@pytest.mark.parametrize("content", [None, "lockstep/row,step,epoch,loss\n1,1,0,0.5\n"])
def test_a_file_that_was_replaced_or_removed_is_whole_again_at_the_next_checkpoint(run: Run, content: str | None) -> None:
    with closing(attempt(run, 1)) as logger:
        for _ in range(2):
            logger.log_metrics({"loss": 0.5})
        run.metrics.unlink()
        if content is not None:
            run.metrics.write_text(content)
        logger.log_metrics({"loss": 0.5})
        assert logger.flush()
        logger.log_metrics({"loss": 0.5})
    assert [row[METRICS_ROW] for row in read_metrics(run.metrics)] == ["1", "2", "3", "4"]


def test_the_owner_is_queried_once_a_second(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now, queries = 100.0, []

    def is_superseded(run: Run, number: int) -> bool:
        queries.append(now)
        return run.newest_attempt > number

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(Run, "is_superseded", is_superseded)
    ownership = Ownership(run, 1)
    for _ in range(30):  # for three seconds
        ownership.check()
        now += 0.1
    assert len(queries) == 3
    run.claim_attempt(Owner(job="8"))
    now += 1
    assert ownership.is_lost()
    with pytest.raises(Superseded):
        ownership.check()
