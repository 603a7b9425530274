"""A rank without progress ends, whatever its disk does."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from lockstep.core.files import atomic_write_json, read_json
from lockstep.core.world import World
from lockstep.monitoring import watchdog
from lockstep.monitoring.watchdog import Watchdog
from lockstep.runs import read_first_failure
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


@pytest.mark.parametrize(("ranks", "reader"), [(range(8), 0), (range(3, 8), 3)])
def test_one_rank_reads_what_all_stuck_ranks_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: range, reader: int
) -> None:
    run = Run.create(tmp_path, "x")
    run.log(1, 0)
    folder = run.attempt_folder(1)
    for rank in ranks:
        atomic_write_json(folder / f"stuck-{rank}.json", {"rank": rank, "heartbeats": 0})
    read: list[tuple[int, str]] = []
    monkeypatch.setattr(watchdog, "_REPORT_SECONDS", 0)
    for rank in ranks:

        def recording(path: Path, rank: int = rank) -> dict[str, Any]:
            read.append((rank, path.name))
            return read_json(path)

        monkeypatch.setattr(watchdog, "read_json", recording)
        Watchdog(run, World(rank, 8, rank, 8), 1, seconds=1)._report(1.0)
    assert sorted(read) == [(reader, f"stuck-{rank}.json") for rank in ranks]
    failure = read_first_failure(run, 1)
    assert failure is not None and failure.rank == 0
