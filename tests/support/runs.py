"""Start, resume and compare runs."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.checkpoint.reader import Checkpoint, latest_checkpoint
from lockstep.checkpoint.serialization import load_weights
from lockstep.core.world import World
from lockstep.monitoring.report import weights_sha256

REPO = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """Exit status and folder of a run that has ended."""

    status: int
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        """``result.json``."""
        result: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return result

    @property
    def newest(self) -> Checkpoint:
        """The newest intact checkpoint."""
        found = latest_checkpoint(self.folder / "checkpoints")
        assert found is not None
        return found

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights in the newest checkpoint."""
        return load_weights(self.newest.model)

    def series(self, metric: str) -> list[float]:
        """All values of a metric in ``metrics.csv``."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            return [float(row[metric]) for row in csv.DictReader(file) if row[metric]]


Launch = Callable[..., Outcome]


SMALL = ("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "5")
"""A short run of the default config."""


def metric_rows(run: Outcome) -> list[dict[str, str]]:
    """All rows of ``metrics.csv``, without the columns that measure time."""
    with (run.folder / "metrics.csv").open(newline="") as file:
        return [_without_rates(row) for row in csv.DictReader(file)]


def _without_rates(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith("rate/")}


_undisturbed: dict[tuple[str, ...], Outcome] = {}


def undisturbed_run(launch: Launch, *arguments: str) -> Outcome:
    """The run with these arguments and without a fault. Each process of pytest does it once."""
    if arguments not in _undisturbed:
        _undisturbed[arguments] = launch(*arguments)
    return _undisturbed[arguments]


def resume_run(launch: Launch, run: Outcome, *arguments: str) -> Outcome:
    """Resume a run."""
    return Outcome(launch("--resume", str(run.folder), *arguments).status, run.folder)


def assert_published(run: Outcome) -> None:
    """Check that the newest checkpoint has the weights and the step that the result reports."""
    assert run.result["status"] == "finished"
    assert run.newest.step == run.result["global_step"]
    assert weights_sha256(run.newest.weights(), World()) == run.result["weights_sha256"]


def assert_same_run(run: Outcome, undisturbed: Outcome) -> None:
    """Check that a run finished with the weights, metrics and step of the undisturbed run."""
    assert run.status == 0
    assert_published(run)
    assert run.result["weights_sha256"] == undisturbed.result["weights_sha256"]
    assert metric_rows(run) == metric_rows(undisturbed)
    assert _without_rates(run.result["metrics"]) == _without_rates(undisturbed.result["metrics"])
    assert run.result["global_step"] == undisturbed.result["global_step"]
