"""Logging: ``self.log`` in all its modes, loggers of one's own, and W&B."""

from typing import Any

import torch
import wandb
from lightning.pytorch.utilities import rank_zero_only
from support.runs import Outcome
from support.wandb_reader import read_history
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError
from torchmetrics.wrappers import MinMaxMetric, Running

from foreign.base import Regression, Row


class StepAndEpoch(Regression):
    """Logs each step and the mean of the epoch, as sums, maxima and by a function of one's own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log("train/most", loss, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        self.log("train/least", loss, on_step=False, on_epoch=True, reduce_fx=min, sync_dist=True)
        self.log("train/samples", float(len(batch[0])), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        self.log("train/weighted", loss, on_step=False, on_epoch=True, batch_size=1 + batch_idx, sync_dist=True)
        return loss


MOST_OF_A_RANK = "the maximum is of the losses of a rank's half of a batch"


class Dicts(Regression):
    """Logs dicts in training and validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log_dict({"train/loss": loss, "train/twice": 2 * loss.detach()}, sync_dist=True, prog_bar=True)
        return {"loss": loss, "more": 1}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_dict({"val/loss": self.loss(batch), "val/batch": float(batch_idx)}, sync_dist=True)


class Metrics(Regression):
    """torchmetrics as attributes, alone and in a collection, logged as objects."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.error = MeanMetric(), MeanAbsoluteError()
        self.val_errors = MetricCollection({"mse": MeanSquaredError(), "mae": MeanAbsoluteError()}, prefix="val/")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        prediction = self.layers(x)
        loss = torch.nn.functional.mse_loss(prediction, y)
        self.mean.update(loss.detach())
        self.error(prediction.detach(), y)
        self.log("train/mean", self.mean, on_step=False, on_epoch=True)
        self.log("train/error", self.error, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.val_errors.update(self.layers(x), y)
        self.log_dict(self.val_errors, on_step=False, on_epoch=True)


class Wrapped(Regression):
    """Wrappers of torchmetrics that keep a part of their state in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.extremes, self.running = MinMaxMetric(MeanSquaredError()), Running(MeanMetric(), window=3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train/running", self.running(loss.detach()), sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.extremes.update(self.layers(x), y)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            values = self.extremes.compute()
            self.log_dict({f"val/{name}": value for name, value in values.items()}, sync_dist=True)
        self.extremes.reset()


class ComputedByHand(Regression):
    """A metric that the user computes, logs and resets at the end of an epoch; outputs collected in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanAbsoluteError()
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.error.update(self.layers(x), y)
        self.outputs.append(self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("val/error", self.error.compute())
        self.error.reset()
        self.log("val/loss", torch.stack(self.outputs).mean(), sync_dist=True)
        self.outputs.clear()


class NotReduced(Regression):
    """Logs a rank's own loss, and a value of rank zero alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train/own", loss)
        if self.trainer.is_global_zero:
            self.log("train/zero", loss, rank_zero_only=True)
        return loss


class InHooks(Regression):
    """Logs in hooks: the gradient's norm of each parameter, and the learning rate."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict({f"norm/{name}": p.grad.norm() for name, p in self.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("lr", self.optimizers().param_groups[0]["lr"])

    def on_train_epoch_end(self) -> None:
        self.log("weight", self.layers[0].weight.norm(), sync_dist=True)


class UsesExperiment(Regression):
    """Calls the logger's experiment, W&B's, as its documentation shows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.is_global_zero:
            self.logger.experiment.log({"own/batch": batch_idx})
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._log_table()

    @rank_zero_only
    def _log_table(self) -> None:
        self.logger.log_table("own/table", columns=["a"], data=[[1]])


class UsesWandb(Regression):
    """Calls ``wandb.log`` beside ``self.log``."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.is_global_zero:
            wandb.log({"own/batch": batch_idx})
            wandb.log({"own/epoch": self.current_epoch})
        return super().training_step(batch, batch_idx)


def wandb_has_every_row(run: Outcome) -> None:
    """Check that W&B has the loss of every step once, in order, and the user's own rows."""
    found = read_history(run.folder)
    losses = [row["train/loss"] for row in found if "train/loss" in row]
    assert losses == run.series("train/loss")
    assert any("own/batch" in row for row in found)


def has_csv(run: Outcome) -> None:
    assert list(run.folder.parents[2].rglob("csv/**/metrics.csv"))


ROWS = (
    Row("`self.log` by step, epoch, sum, maximum, `batch_size`", model=StepAndEpoch, logged_per_rank=MOST_OF_A_RANK),
    Row("`log_dict`, and a `training_step` that returns a dict", model=Dicts),
    Row(
        "torchmetrics as attributes, logged as objects and as a collection",
        model=Metrics,
        logged_per_rank="a step logs the metric of rank zero's own batch",
    ),
    Row("`MinMaxMetric` and `Running` of torchmetrics", "--trainer.max_epochs 3", model=Wrapped, kill_step=15),
    Row("a metric computed and reset by hand at the end of validation", model=ComputedByHand),
    Row("`self.log` without `sync_dist`", model=NotReduced, logged_per_rank="rank zero logs its own half of the batch"),
    Row("`self.log` in hooks", model=InHooks),
    Row("`log_every_n_steps: 5`", "--trainer.log_every_n_steps 5", model=StepAndEpoch, logged_per_rank=MOST_OF_A_RANK),
    Row(
        "`self.logger.experiment.log` and `log_table`",
        "--wandb.mode offline",
        model=UsesExperiment,
        own_order="the plain Trainer has no W&B here",
        check=wandb_has_every_row,
    ),
    Row(
        "`wandb.log` beside `self.log`",
        "--wandb.mode offline",
        model=UsesWandb,
        own_order="the plain Trainer has no W&B here",
        check=wandb_has_every_row,
    ),
    Row(
        "a custom `CSVLogger` (each attempt writes a new version of its files)",
        "--trainer.logger CSVLogger --trainer.logger.save_dir csv",
        check=has_csv,
    ),
    Row(
        "a custom `WandbLogger`",
        "--trainer.logger WandbLogger",
        refused="trainer.logger: WandbLogger would log every row to W&B again",
    ),
    Row("`logger: false`", "--trainer.logger false"),
)
