"""Ranks keep equal weights under DDP, or the run says where they have parted.

Runs of real ranks on this machine.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from support.faults import fault
from support.runs import Launch, assert_same_run, resume_run
from support.toy_model import ToyModel
from torch import Tensor, nn
from torch.nn.utils import prune

from lockstep.distributed import consensus

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


class UsesHalf(Backboned):
    """Never uses one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


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


class Prunes(Callback):
    """Prunes a bias, then a weight, in mid-epoch: each gets another name and another place among the parameters."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 10:
            prune.l1_unstructured(pl_module.backbone[0], "bias", 0.25)  # type: ignore[no-untyped-call]
            prune.l1_unstructured(pl_module.head, "weight", 0.25)  # type: ignore[no-untyped-call]


MODEL_PRUNING = (
    *("--trainer.callbacks+=ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured"),
    *("--trainer.callbacks.amount=0.2", "--trainer.callbacks.use_lottery_ticket_hypothesis=false"),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", f"{MINE}AllTrained", *MODEL_PRUNING),
        ("--model", f"{MINE}AllTrained", f"--trainer.callbacks+={MINE}Prunes", *FINETUNING[2:]),
        ("--model", f"{MINE}UsesHalf", "--ddp.static_graph", "true"),
    ],
    ids=["ModelPruning", "prune and unfreeze", "static graph"],
)
def test_three_ranks_resume_with_the_order_of_gradients(launch: Launch, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    three = (*TOY, *arguments, "--ranks", "3", "--checkpoint.async_save", "false")
    run = launch(*three, *fault(tmp_path / "once", "SIGKILL", step=36))
    assert run.newest.step == 35
    assert_same_run(resume_run(launch, run), launch(*three))


class Grows(AllTrained):
    """Gets another layer in the middle of an epoch."""

    def on_train_batch_start(self, *_: Any) -> None:
        if self.global_step == 10:
            self.extra = nn.Linear(4, 1)
            self.extra.requires_grad_(False).weight.fill_(0.5)
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            optimizer.add_param_group({"params": list(self.extra.requires_grad_(True).parameters())})

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x) + (self.extra(x) if hasattr(self, "extra") else 0), y)
        self.log("train/loss", loss, on_step=True, sync_dist=True)
        return loss


def test_parameters_that_are_new_in_mid_epoch_are_reduced(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    both = launch(*TOY, "--model", f"{MINE}Grows", "--trainer.max_steps", "19")
    assert "parameter extra.weight is new; a restart can restore it only if on_load_checkpoint" in capfd.readouterr().err
    alone = launch(*TOY, "--model", f"{MINE}Grows", "--trainer.max_steps", "19", "--ranks", "1")
    assert both.series("train/loss") == pytest.approx(alone.series("train/loss"), abs=1e-4)


class UnfreezesInStep(AllTrained):
    """Unfreezes a layer when the step has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone[0].requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.backbone[0].requires_grad_(self.global_step >= 10)
        return self._loss(batch)


class UnfreezesAlone(Unfreezes):
    """Unfreezes a layer on one rank."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_rank == 1:
            super().on_train_batch_start(trainer, pl_module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", f"{MINE}UnfreezesInStep"), "begins to require a gradient within step 10"),
        (
            ("--model", f"{MINE}AllTrained", f"--trainer.callbacks+={MINE}UnfreezesAlone"),
            "layers.0.0.weight begins to require a gradient on rank 1 in step 10, but not on all ranks",
        ),
    ],
)
def test_what_ddp_cannot_reduce_is_refused_in_its_step(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(consensus, "_MEETING_SECONDS", 2.0)
    assert launch(*TOY, *arguments).status != 0
    assert message in capfd.readouterr().err


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
