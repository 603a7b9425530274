"""Records of a run folder are read back, and a damaged file is named and ignored; files alone."""

import logging
from pathlib import Path

import pytest

from lockstep.runs import Durations, LaunchRecord, Owner, RunProgress, RunResult, SweepRun
from lockstep.runs.records import GitState


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    result = RunResult("failed", "fit", 4, 2, ["SIGTERM"], "rank 1: no", 1, 12, 1, Durations(1.5, 2.0, 0.0), {"val/loss": 0.5})
    result.write(tmp_path / "result.json")
    assert RunResult.read(tmp_path / "result.json") == result
    sweep = SweepRun("x", 0, {"model.lr": "1e-3"})
    launch = LaunchRecord("python launch/slurm.py --nodes 2-4", "2-4", 1, GitState("c0ffee", changed=True), sweep=sweep)
    launch.write(tmp_path / "launch.yaml")
    assert LaunchRecord.read(tmp_path / "launch.yaml") == launch and launch.max_nodes == 4


def test_fields_that_are_none_are_not_written_and_unknown_ones_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_text('{"job": "7", "colour": "red"}')
    assert Owner.read(tmp_path / "owner.json") == Owner(job="7")
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
