"""A damaged or shortened metrics file is named when a run resumes, and does not stop it; files alone."""

import logging
from pathlib import Path

import pytest

from lockstep.monitoring.csv_logger import CsvMetricsLogger, read_metrics


def resume(path: Path, row_count: int) -> list[str]:
    """Resume after ``row_count`` rows, log one more, and return the steps that the file has then."""
    logger = CsvMetricsLogger(path, lambda: row_count + 1)
    logger.resume(row_count)
    logger.log_metrics({"loss": 0.5})
    logger.flush()
    return [row["step"] for row in read_metrics(path)]


@pytest.mark.parametrize("content", [b"\xff\xfe\n\xff\n", b"step,loss\n1,a\n", b"loss\n1\n", b"step,loss\n1,0.5,3\n"])
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
    path.write_text("step,epoch,loss\n1,0,0.5\n2,0,nan\n")
    with caplog.at_level(logging.WARNING, "lockstep"):
        assert resume(path, 2) == ["1", "2", "3"]
        assert not caplog.text
        assert resume(path, 5) == ["1", "2", "3", "6"]
    assert f"{path} has 3 of the 5 rows before the checkpoint" in caplog.text
