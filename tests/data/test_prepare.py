"""Data are prepared atomically: one process, then killed processes, then calls of prepare_data counted in real ranks."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.runs import SMALL, Launch

from lockstep.config import SHIPPED, check_run_root, check_start
from lockstep.config.validation import validate_arguments
from lockstep.core.errors import UsageError
from lockstep.data.digits import Digits
from lockstep.data.downloaded import MNIST
from lockstep.data.image_folder import ImageFolder
from lockstep.data.prepare import prepare_folder
from lockstep.runs import Run


def test_a_folder_is_prepared_once(tmp_path: Path) -> None:
    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("data")

    for _ in range(2):
        prepare_folder(tmp_path / "new" / "data", fill)
    assert len(calls) == 1
    assert (tmp_path / "new" / "data" / "deep" / "file").read_text() == "data"
    assert [path.name for path in (tmp_path / "new").iterdir() if not path.name.endswith(".lock")] == ["data"]


def test_an_error_leaves_no_partial_folder(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("the checksum is wrong")

    with pytest.raises(UsageError, match=r"is missing and could not be prepared .the checksum is wrong."):
        prepare_folder(tmp_path / "data", fill)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_folder_that_cannot_be_written_raises_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data.root: .*/file/data is missing and could not be prepared"):
        prepare_folder(tmp_path / "file" / "data", lambda folder: None)


def test_a_second_job_waits_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")

    def slow(folder: Path) -> None:
        (folder / "half").write_text("half")
        time.sleep(60)

    first = context.Process(target=prepare_folder, args=(tmp_path / "data", slow))
    first.start()
    while not list(tmp_path.glob(".data.*.partial/half")):
        time.sleep(0.01)
    second = context.Process(
        target=prepare_folder, args=(tmp_path / "data", lambda folder: (folder / "whole").write_text("whole"))
    )
    second.start()
    time.sleep(0.3)
    assert second.is_alive()
    assert not (tmp_path / "data").exists()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    second.join(10)
    first.join()
    assert second.exitcode == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["whole"]
    assert not list(tmp_path.glob("*.partial"))


class Counted(Digits):
    """Records each call as a file in a folder."""

    def prepare_data(self) -> None:
        self._record("prepare")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self._record("setup")
            assert set(self._datasets) == {"train", "val"}

    def _record(self, call: str) -> None:
        assert self.trainer is not None
        Path(os.environ["COUNTED"], f"{call}-{self.trainer.global_rank}-{os.getpid()}").touch()


@pytest.mark.parametrize(("shared", "prepared_by"), [("true", ["0"]), ("false", ["0", "2"])])
def test_prepare_data_runs_once_per_job_or_node_and_setup_on_every_rank(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str, prepared_by: list[str]
) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    monkeypatch.setenv("COUNTED", str(calls))
    layout = ["--nodes", "2", "--ranks", "2", "--shared_filesystem", shared]
    run = launch(*layout, *SMALL, "--data", f"{__name__}.Counted", "--run.test_after_fit", "false")
    assert run.status == 0
    recorded = [path.name.split("-") for path in calls.iterdir()]
    assert sorted(rank for call, rank, _ in recorded if call == "prepare") == prepared_by
    assert sorted(rank for call, rank, _ in recorded if call == "setup") == ["0", "1", "2", "3"]
    assert len({pid for _, _, pid in recorded}) == 4


@pytest.fixture
def unreadable() -> Iterator[Path]:
    """A folder in one that this process may not search."""
    above = Path(tempfile.mkdtemp())  # not in pytest's, which only root may search
    above.chmod(0o755)
    closed = above / "closed"
    (closed / "data").mkdir(parents=True)
    closed.chmod(0)
    if is_root := os.getuid() == 0:  # which may read everything
        os.setresuid(65534, 65534, 0)
    yield closed / "data"
    if is_root:
        os.setresuid(0, 0, 0)
    closed.chmod(0o700)
    shutil.rmtree(above)


def test_a_folder_that_cannot_be_read_is_one_sentence(unreadable: Path) -> None:
    config = validate_arguments(["--config", str(SHIPPED / "digits.yaml")])

    def start(command: str, root: Path, **keys: Any) -> None:
        data = {"class_path": "lockstep.data.MNIST", "init_args": {"root": root}}
        check_start(command, {**config, "data": data, **keys}, [], {})

    checks: list[tuple[Callable[[], object], str]] = [
        (lambda: start("fit", unreadable), "data.root: .* cannot be written"),
        (lambda: start("fit", unreadable.parent), "data.root: .*closed cannot be read; its permissions do not allow it"),
        (lambda: start("test", unreadable, ckpt_path=str(unreadable)), "ckpt_path: .* does not exist"),
        (lambda: check_run_root(unreadable, "x"), "run.root: .* cannot be written"),
        (lambda: Run.open(unreadable), "is not a run folder"),
        (lambda: ImageFolder(root=unreadable).load("train"), "data.root: .* cannot be read .Permission denied"),
        (lambda: MNIST(root=unreadable).prepare_data(), "data.root: .* could not be prepared .*Permission denied"),
    ]
    for check, said in checks:
        with pytest.raises(UsageError, match=said):
            check()
