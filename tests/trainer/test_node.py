"""What the agent of a node does when it cannot write to the run folder."""

from pathlib import Path

import pytest

from lockstep.core import World
from lockstep.runs import Failure, Run
from lockstep.trainer.node import Node


def test_a_failure_that_cannot_be_recorded_is_logged_and_does_not_end_the_agent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = object.__new__(Node)
    node.run_folder = Run(tmp_path / "gone")
    node._record(2, Failure.from_report("RuntimeError: the disk is full", World()))
    assert "the failure of attempt 2 could not be recorded ([Errno 2] No such file" in caplog.text
    assert "RuntimeError: the disk is full" in caplog.text
