"""The task of a node, in a fork."""

import multiprocessing
from pathlib import Path

import pytest

from lockstep.runs import Run, read_first_failure
from lockstep.slurm import NodeTask, task


def test_imports_that_hang_end_the_attempt_with_their_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slow_import.py").write_text("import time\n\n\ndef wait():\n    time.sleep(50)\n\n\nwait()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(task, "ENTRY_POINT", "slow_import:Node")
    monkeypatch.setattr(task, "_IMPORT_SECONDS", 1.0)
    monkeypatch.setenv("LOCKSTEP_ATTEMPT", "1")
    run = Run.create(tmp_path / "runs", "x")
    run.log(1)  # makes the folder of the attempt
    process = multiprocessing.get_context("fork").Process(
        target=NodeTask(run.folder, tmp_path / "slurm", "fit", (), "", 1, None)
    )
    process.start()
    process.join()
    assert process.exitcode == 1
    failure = read_first_failure(run, 1)
    assert failure is not None
    sentence = f"The imports on node 0 have not finished after 1 s; its stack is in its output in {tmp_path}/slurm."
    assert failure.report == sentence
    assert 'slow_import.py", line 5 in wait' in capfd.readouterr().err
