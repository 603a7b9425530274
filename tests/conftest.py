"""What tests share: runs in a temporary folder, W&B offline, and one way to start a run."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))

import local

from lockstep.logs import stop_logging

REPO = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    status: int
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        """``result.json``."""
        return json.loads((self.folder / "result.json").read_text())  # type: ignore[no-any-return]

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
    """Start ``launch/local.py`` in this process: ``launch("--ranks", "2", …)``, in a run folder below ``tmp_path``."""

    def start(*arguments: str) -> Outcome:
        root = tmp_path / "runs"
        before = set(root.glob("*/*"))
        status = local.main([*arguments, "--run.root", str(root)])
        made = [folder for folder in root.glob("*/*") if folder not in before]
        return Outcome(status, made[0] if made else root)

    return start


SMALL = ("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "5")
"""A short run of the default config."""
