"""Callbacks: Lightning's, and those that people write."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, LambdaCallback, LearningRateFinder
from support.runs import Outcome
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from foreign.base import Points, Regression, Row, points


def callback(name: str, **arguments: object) -> str:
    """Flags that add a callback."""
    flags = [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in arguments.items())]
    return " ".join(flags)


class LoadBest(Callback):
    """The first epoch is the best one here: the weights of the end would show that it was forgotten."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.checkpoint_callback is not None
        best = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
        pl_module.load_state_dict(best["state_dict"])


class FindsRate(Regression):
    def configure_callbacks(self) -> Any:
        return [LearningRateFinder()]


class Backbone(Regression):
    """A network with a backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 8)
        self.layers = nn.Sequential(self.backbone, nn.Tanh(), nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Unfreeze(BaseFinetuning):
    """Unfreezes the backbone after an epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.01)


class Shrink(Callback):
    """Shrinks the weights at the end of an epoch, more each time; its count is in its ``state_dict``."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.count += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1 - 0.01 * self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class Scaled(Dataset[Any]):
    """Points whose target is scaled by an attribute that callbacks change."""

    def __init__(self) -> None:
        self.points, self.scale = points(), 1.0

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.points[index]
        return x, self.scale * y


class ScaledPoints(Points):
    def dataset(self) -> Dataset[Any]:
        return Scaled()


class Curriculum(Callback):
    """Makes the data harder with each epoch, through the Trainer's DataLoader."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dataset = trainer.train_dataloader.dataset
        assert isinstance(dataset, Scaled) and isinstance(trainer.train_dataloader, DataLoader)
        dataset.scale = 1.0 + trainer.current_epoch
        x, y = trainer.train_dataloader.dataset[0]
        assert x.shape == (4,) and y == dataset.scale * x.sum()


class StopAfter(Callback):
    """Ends training in mid-epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True


class LogsNorm(Callback):
    """Logs the norm of the gradient and of the weights through the module."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        norm = torch.stack([p.grad.norm() for p in pl_module.parameters() if p.grad is not None]).norm()
        pl_module.log("grad_norm", norm)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("weight_norm", torch.stack([p.norm() for p in pl_module.parameters()]).norm())


class KeepsObject(Callback):
    """Has an object of a class of one's own in its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"owner": Points}


class LogsItself(Callback):
    """Logs a row of its own with the Trainer's logger, beside the module's."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            trainer.logger.log_metrics({"own/step": trainer.global_step}, step=trainer.global_step)


class Halves(LambdaCallback):
    """A LambdaCallback with its functions, which YAML cannot write."""

    def __init__(self) -> None:
        super().__init__(on_train_batch_start=lambda trainer, module, *_: module.layers[2].weight.data.mul_(0.9))


def ends_after(steps: int) -> Any:
    """A check that a run has ended after ``steps`` steps."""

    def check(run: Outcome) -> None:
        assert run.result["global_step"] == steps

    return check


def has_own_checkpoints(run: Outcome) -> None:
    """Check that Lightning's ModelCheckpoint has written the folder that its user named."""
    assert list(run.folder.rglob("*.ckpt"))


ROWS = (
    Row("no callback"),
    Row(
        "`EarlyStopping` on a metric of validation",
        callback("EarlyStopping", monitor="val/loss", patience=0, min_delta=9) + " --trainer.max_epochs 9",
        check=ends_after(12),
    ),
    Row(
        "`EarlyStopping` on a metric of training, in mid-validation-interval",
        callback("EarlyStopping", monitor="train/loss", patience=0, min_delta=9, check_on_train_epoch_end="true")
        + " --trainer.max_epochs 9 --trainer.check_val_every_n_epoch 5",
        check=ends_after(12),
    ),
    Row(
        "a callback that loads the best weights of `ModelCheckpoint` at the end",
        f"{callback('ModelCheckpoint', monitor='val/loss', mode='max')} {callback('foreign.callbacks.LoadBest')}",
    ),
    Row(
        "`LearningRateFinder` from `configure_callbacks`",
        model=FindsRate,
        refused="configure_callbacks: LearningRateFinder",
    ),
    Row(
        "a custom `ModelCheckpoint`",
        callback("ModelCheckpoint", monitor="val/loss", save_top_k=1, save_last="true"),
        check=has_own_checkpoints,
    ),
    Row("`LearningRateMonitor`", callback("LearningRateMonitor", logging_interval="step")),
    Row(
        "`StochasticWeightAveraging`",
        callback("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1),
    ),
    Row("`WeightAveraging` by `EMAWeightAveraging`", callback("EMAWeightAveraging", decay=0.9)),
    Row("`GradientAccumulationScheduler`", callback("GradientAccumulationScheduler", scheduling="'{0: 1, 1: 2}'"), kill_step=8),
    Row(
        "`BackboneFinetuning`",
        callback("BackboneFinetuning", unfreeze_backbone_at_epoch=1),
        model=Backbone,
    ),
    Row(
        "a custom `BaseFinetuning`",
        callback("foreign.callbacks.Unfreeze"),
        model=Backbone,
    ),
    Row(
        "`ModelPruning`",
        callback("ModelPruning", pruning_fn="l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis="false"),
    ),
    Row(
        "`ModelPruning` with the lottery ticket",
        callback("ModelPruning", pruning_fn="l1_unstructured", amount=0.2) + " --trainer.max_epochs 4",
        own_order="on a CPU a plain Trainer also trains the original weights that the ticket restores",
        kill_step=20,
    ),
    Row("`Timer`", callback("Timer", duration="00:01:00:00")),
    Row("`LambdaCallback`", callback("foreign.callbacks.Halves")),
    Row("`TQDMProgressBar`", callback("TQDMProgressBar", refresh_rate=1)),
    Row("`RichProgressBar` and `RichModelSummary`", callback("RichProgressBar") + " " + callback("RichModelSummary")),
    Row("`ModelSummary`", callback("ModelSummary", max_depth=2)),
    Row("`DeviceStatsMonitor`", callback("DeviceStatsMonitor", cpu_stats="true"), measured=("DeviceStatsMonitor",)),
    Row(
        "`LearningRateFinder`",
        callback("LearningRateFinder", num_training_steps=8),
        refused="trainer.callbacks: LearningRateFinder takes trial steps whose losses are those of rank zero alone",
    ),
    Row(
        "`BatchSizeFinder`",
        callback("BatchSizeFinder", max_trials=2),
        refused="trainer.callbacks: BatchSizeFinder sets the size that fits the memory of this machine",
    ),
    Row(
        "a callback with a `state_dict`, which changes the weights",
        callback("foreign.callbacks.Shrink"),
    ),
    Row(
        "a curriculum: a callback changes the dataset",
        callback("foreign.callbacks.Curriculum"),
        data=ScaledPoints,
    ),
    Row(
        "a curriculum, with workers",
        callback("foreign.callbacks.Curriculum") + " --data.workers 1",
        data=ScaledPoints,
    ),
    Row("a callback sets `should_stop` in mid-epoch", callback("foreign.callbacks.StopAfter", step=10), check=ends_after(10)),
    Row(
        "a callback whose `state_dict` has an object of a custom class",
        callback("foreign.callbacks.KeepsObject"),
        refused="A checkpoint cannot hold ['KeepsObject']['owner']",
    ),
    Row("a callback logs through the module", callback("foreign.callbacks.LogsNorm")),
    Row("a callback logs rows of its own", callback("foreign.callbacks.LogsItself")),
)
