"""The task of a node, in a fork."""

import multiprocessing
import weakref
from pathlib import Path

import pytest

from lockstep.runs import Run, read_first_failure
from lockstep.slurm import NodeTask, task


def run_in_fork(task: NodeTask) -> int | None:
    """Run a task in a fork, as it ends its process, and return the exit status."""

    def run() -> None:
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # those of this process are not the task's to run
        task()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def test_temporary_folders_of_libraries_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["import tempfile", f"KEPT = tempfile.TemporaryDirectory(dir={str(tmp_path)!r}, suffix='library')"]
    lines += ["class Node:", "    __init__ = print", "    def run(self):", "        return 7"]
    (tmp_path / "makes_folder.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(task, "ENTRY_POINT", "makes_folder:Node")
    monkeypatch.setenv("LOCKSTEP_ATTEMPT", "1")
    run = Run.create(tmp_path / "runs", "x")
    run.log(1)
    assert run_in_fork(NodeTask(run.folder, tmp_path / "slurm", "fit", (), "", 1, None)) == 7
    assert not list(tmp_path.glob("*library"))


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
    assert run_in_fork(NodeTask(run.folder, tmp_path / "slurm", "fit", (), "", 1, None)) == 1
    failure = read_first_failure(run, 1)
    assert failure is not None
    sentence = f"The imports on node 0 have not finished after 1 s; its stack is in its output in {tmp_path}/slurm."
    assert failure.report == sentence
    assert 'slow_import.py", line 5 in wait' in capfd.readouterr().err
