"""What tests share: runs in a temporary folder, W&B offline, and one way to start a run."""

import os

# The ranks are forked from this process, and a thread pool does not survive a fork: torch must not make one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo on CPUs, whatever the machine has
os.environ["DS_ACCELERATOR"] = "cpu"

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import local
import pytest
from support.runs import Launch, Outcome

from lockstep.core.logging import reset_logging

pytest_plugins = ["support.slurm_cluster"]  # the fixtures of tests/slurm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that use a cluster one after the other: they wait more than they compute, and run beside the others."""
    for item in items:
        if "slurm_is_here" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("slurm"))


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no server, no variables of a cluster; W&B off unless a test asks for it."""
    for name in ("WANDB_API_KEY", "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    reset_logging()


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Call ``launch/local.py``'s main: ``launch("--ranks", "2", …)``, in a run folder below ``tmp_path``.

    In a fork: a process that has once run backward cannot fork ranks any more, and pytest's must be able to.
    """

    def start(*arguments: str) -> Outcome:
        root = tmp_path / "runs"
        before = set(root.glob("*/*"))
        command = [*arguments, "--run.root", str(root)]
        process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(local.main(command)))
        process.start()
        process.join()
        made = [folder for folder in root.glob("*/*") if folder not in before]
        assert process.exitcode is not None
        return Outcome(process.exitcode, made[0] if made else root)

    return start
