"""Ranks keep equal weights under DDP, or the run says where they have parted.

Runs of real ranks on this machine.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from support.faults import fault
from support.runs import Launch, assert_same_run, resume_run
from support.toy_model import ToyModel
from torch import Tensor, nn

MINE = f"{__name__}."
TOY = (
    *("--data", "support.toy_model.ToyData", "--data.workers", "0", "--trainer.max_epochs", "3", "--ranks", "2"),
    *("--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "1", "--checkpoint.every_n_steps", "7"),
)


class Backboned(ToyModel):
    """A backbone that a callback may unfreeze, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(8, 1)
        self.layers = nn.Sequential(self.backbone, self.head)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=0.005, momentum=0.9)


class Unfreezes(Callback):
    """Freezes the first layer, and unfreezes it in the middle of an epoch."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.backbone[0].requires_grad_(False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 10:
            pl_module.backbone[0].requires_grad_(True)


class AllTrained(Backboned):
    """All parameters are in the optimizer."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.005, momentum=0.9)


FINETUNING = (
    *("--model", f"{MINE}Backboned", "--trainer.callbacks+=BackboneFinetuning"),
    *("--trainer.callbacks.unfreeze_backbone_at_epoch=1", "--trainer.callbacks.backbone_initial_lr=0.002"),
)
UNFREEZING = ("--model", f"{MINE}AllTrained", f"--trainer.callbacks+={MINE}Unfreezes")


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("arguments", [FINETUNING, UNFREEZING])
def test_parameters_that_are_unfrozen_are_reduced(launch: Launch, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    both = launch(*TOY, *arguments)
    alone = launch(*TOY, *arguments, "--ranks", "1")
    assert both.series("train/loss_step") == pytest.approx(alone.series("train/loss_step"), abs=1e-4)
    run = launch(*TOY, *arguments, *fault(tmp_path / "once", "SIGKILL", step=17))
    assert resume_run(launch, run, *fault(tmp_path / "twice", "SIGKILL", step=32)).status != 0
    assert_same_run(resume_run(launch, run), both)


def test_parameters_that_are_unfrozen_are_refused_in_a_static_graph(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(*TOY, *UNFREEZING, "--ddp.static_graph", "true").status == 2
    said = capfd.readouterr().err
    assert "ddp.static_graph: layers.0.0.weight begins to require a gradient during training; set it to false." in said


class Parts(Callback):
    """Changes a parameter on one rank."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 9 and trainer.global_rank == 1:
            with torch.no_grad():
                next(iter(pl_module.get_submodule("backbone.2").parameters()))[0, 0] += 1e-6


def test_ranks_that_part_are_named(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    run = launch(*TOY, "--model", f"{MINE}AllTrained", f"--trainer.callbacks+={MINE}Parts")
    assert run.status == 1 and run.newest.step == 7
    said = capfd.readouterr().err
    assert "After step 14 the ranks have different weights: layers.0.2.weight of rank 1 differ" in said
    assert "after step 7 they were equal" in said


class LeavesSomeUnused(Backboned):
    """Does not use the backbone in every second step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch) if batch_idx % 2 else self.head(batch[0].repeat(1, 2)).mean()


def test_unused_parameters_are_named_with_the_key(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(*TOY, "--model", f"{MINE}LeavesSomeUnused").status == 1
    said = capfd.readouterr().err
    assert "did not use all parameters (layers.0.0.weight, layers.0.0.bias, layers.0.2.weight …)" in said
    assert "set ddp.find_unused_parameters to true" in said and "strategy=" not in said
    assert launch(*TOY, "--model", f"{MINE}LeavesSomeUnused", "--ddp.find_unused_parameters", "true").status == 0
