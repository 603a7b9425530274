"""Environment of all tests, and the fixture that starts a run."""

import os

# Ranks are forked from this process, and a thread pool does not survive a fork: torch must not create one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks use gloo on CPUs
os.environ["DS_ACCELERATOR"] = "cpu"

import multiprocessing
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import local
import pytest
from support.runs import Launch, Outcome

from lockstep.core.logging import reset_logging

# Tests that run in the background inherit an ignored SIGINT, which no shell can trap.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["support.slurm_cluster"]  # the fixtures of tests/slurm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of a cluster and those of DeepSpeed to one worker each, first; all others go where a worker is free.

    The former share a cluster, and wait more than they compute. The latter share the import of DeepSpeed and undisturbed runs.
    """
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: ("slurm", "deepspeed", "").index(groups[item]))


def _group(item: pytest.Item) -> str:
    if "slurm_is_here" in getattr(item, "fixturenames", ()):
        return "slurm"
    return "deepspeed" if "strategies" in item.path.parts else ""


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove keys and variables of a launcher, and disable W&B unless a test enables it."""
    for name in ("WANDB_API_KEY", "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    reset_logging()


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run ``launch/local.py`` with some arguments: ``launch("--ranks", "2", …)``. The run folder is below ``tmp_path``.

    It runs in a fork, because a process that has run backward cannot fork ranks.
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
