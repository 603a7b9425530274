"""What tests share: runs in a temporary folder, W&B offline, and one way to start a run."""

import os

# The ranks are forked from this process, and a thread pool does not survive a fork: torch must not make one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo on CPUs, whatever the machine has
os.environ["DS_ACCELERATOR"] = "cpu"

import csv
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import local
import pytest
import torch

from lockstep.checkpoint import Checkpoint, newest
from lockstep.logs import stop_logging

pytest_plugins = ["shell"]  # the fixtures of tests/slurm

REPO = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests of Slurm, which wait more than they compute, run one after the other beside all others."""
    for item in items:
        if "slurm" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("slurm"))


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    status: int
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        """``result.json``."""
        return json.loads((self.folder / "result.json").read_text())

    @property
    def newest(self) -> Checkpoint:
        """The newest whole checkpoint."""
        found = newest(self.folder / "checkpoints")
        assert found is not None
        return found

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Those of the newest checkpoint."""
        return torch.load(self.newest.model, weights_only=True)["state_dict"]

    def series(self, metric: str) -> list[float]:
        """All values of a metric in ``metrics.csv``."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            return [float(row[metric]) for row in csv.DictReader(file) if row[metric]]


Launch = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no server, no variables of a cluster; W&B off unless a test asks for it."""
    for name in ("WANDB_API_KEY", "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    stop_logging()


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


SMALL = ("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "5")
"""A short run of the default config."""
