"""A rank without progress ends, whatever its disk does."""

import multiprocessing
import os
from pathlib import Path

import pytest

from lockstep.core.world import World
from lockstep.monitoring import watchdog
from lockstep.monitoring.watchdog import Watchdog
from lockstep.runs.run import Run


def be_stuck(run: Run) -> None:
    """Make no progress, on a disk where nothing can be written."""
    os.mkfifo(run.folder / "logs" / "1" / f".stuck-0.json.{os.getpid()}")
    stuck = Watchdog(run, World(), 1, seconds=0.1)
    stuck._start()
    stuck._finish_step()
    stuck._stopped.wait()


def test_a_stuck_rank_ends_even_if_its_report_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path, "x")
    run.log(1, 0)
    monkeypatch.setattr(watchdog, "_REPORT_LIMIT_SECONDS", 0.2)
    process = multiprocessing.get_context("fork").Process(target=be_stuck, args=(run,))
    process.start()
    process.join(60)
    assert process.exitcode == 1
