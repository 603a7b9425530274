"""Start, fault, resume and compare runs."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.checkpoint.reader import Checkpoint, latest_checkpoint

REPO = Path(__file__).parents[2]


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
        found = latest_checkpoint(self.folder / "checkpoints")
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


SMALL = ("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "5")
"""A short run of the default config."""


def trouble(once: Path, what: str, **more: Any) -> list[str]:
    """Arguments that make something go wrong once."""
    given = {"what": what, "once": once, **more}
    return [
        "--trainer.callbacks+=support.fault_callbacks.FaultCallback",
        *(f"--trainer.callbacks.{name}={value}" for name, value in given.items()),
    ]


def rows(run: Outcome) -> list[dict[str, str]]:
    """All rows of metrics, without those that measure time."""
    with (run.folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if not name.startswith("rate/")} for row in csv.DictReader(file)]


_undisturbed: dict[tuple[str, ...], Outcome] = {}


def left_alone(launch: Launch, *arguments: str) -> Outcome:
    """The same run undisturbed; it is done once."""
    if arguments not in _undisturbed:
        _undisturbed[arguments] = launch(*arguments)
    return _undisturbed[arguments]


def go_on(launch: Launch, run: Outcome, *arguments: str) -> Outcome:
    """Resume a run."""
    return Outcome(launch("--resume", str(run.folder), *arguments).status, run.folder)


def assert_same(run: Outcome, undisturbed: Outcome) -> None:
    """Weights, metrics and counts are those of the undisturbed run."""
    assert run.status == 0 and run.result["status"] == "finished"
    assert run.result["weights_sha256"] == undisturbed.result["weights_sha256"]
    assert rows(run) == rows(undisturbed)
    assert {n: v for n, v in run.result["metrics"].items() if not n.startswith("rate/")} == {
        n: v for n, v in undisturbed.result["metrics"].items() if not n.startswith("rate/")
    }
    assert run.result["global_step"] == undisturbed.result["global_step"]
