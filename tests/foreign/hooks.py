"""Hooks and overrides of a LightningModule and of a DataModule."""

import copy
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, random_split

from foreign.base import BATCH_SIZE, SAMPLES, Points, Regression, Row, points


class ScalesGradients(Regression):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


class WarmsUp(Regression):
    """``optimizer_step`` with a warm-up, as Lightning's documentation shows."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1.0, (self.trainer.global_step + 1) / 8)
        optimizer.step(closure=optimizer_closure)


class Skips(Regression):
    """A ``training_step`` that returns None for every third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx % 3 != 1 else None


class EndsEpoch(Regression):
    """Ends an epoch after four batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 4 else None


class Configured(Regression):
    """Makes its layers in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Identity()

    def configure_model(self) -> None:
        if isinstance(self.layers, nn.Identity):
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class Remembers(Regression):
    """Keeps a plain number of its own in the checkpoint, which scales the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return super().training_step(batch, batch_idx) / (1 + 0.1 * self.seen)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint["seen"]


class RemembersEverything(Remembers):
    """Keeps things in the checkpoint that are not tensors."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["device"], checkpoint["set"], checkpoint["none"] = torch.device("cpu"), {1, 2}, None


class Transfers(Points):
    """Hooks of a batch on its way to the device."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return tuple(tensor.to(device) for tensor in batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] - 1, batch[1]


class StatefulData(Points):
    """A DataModule with a ``state_dict``: a number that grows with the batches and scales them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer is not None and self.trainer.training:
            self.count += 1
            return batch[0] * (1 + 0.01 * self.count), batch[1]
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class Shrinks(Regression):
    """Changes its weights at the end of each epoch, and of the training."""

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            self.layers[0].weight.mul_(0.5)

    def on_train_end(self) -> None:
        with torch.no_grad():
            self.layers[2].weight.mul_(0.5)


class OwnAverage(Regression):
    """An exponential moving average of the weights in the module, validated in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.layers).requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.layers.parameters(), strict=True):
                mean.lerp_(value, 0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.log("val/loss", nn.functional.mse_loss(self.average(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layers.parameters(), lr=0.05)


class ClipsItself(Regression):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")


class OwnBackward(Regression):
    def backward(self, loss: Any) -> None:
        (2 * loss).backward()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class DrawsInHooks(Regression):
    """Noise on the weights in a hook, from torch's generator: each rank draws the same, as all ranks seed it."""

    def on_train_epoch_start(self) -> None:
        generator = torch.Generator().manual_seed(self.current_epoch)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


class HalvesRate(Callback):
    """Halves the learning rate by hand at the start of an epoch, and counts epochs in its ``state_dict``."""

    def __init__(self) -> None:
        self.epochs = 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs += 1
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= 0.5**self.epochs

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]


class RandomSplit(Points):
    """Splits the data at random in ``setup``, by torch's generator."""

    def setup(self, stage: str) -> None:
        self.train, self.val = random_split(points(samples=2 * SAMPLES), [SAMPLES, SAMPLES])

    def dataset(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=BATCH_SIZE)


SEEDED_AGAIN = "on one rank too, the seed is set again before `setup`, as Lightning does on several"

ROWS = (
    Row("`on_before_optimizer_step` changes gradients", model=ScalesGradients),
    Row("`optimizer_step` with a warm-up", model=WarmsUp),
    Row(
        "`training_step` returns None for some batches",
        model=Skips,
        refused_late="Skipping the `training_step` by returning None in distributed training is not supported",
    ),
    Row("`on_train_batch_start` returns -1", model=EndsEpoch, kill_step=7),
    Row("a callback halves the learning rate at the start of an epoch", "--trainer.callbacks+=foreign.hooks.HalvesRate"),
    Row("`setup` splits the data at random", data=RandomSplit, own_order=SEEDED_AGAIN),
    Row("`configure_model`", model=Configured, own_order=SEEDED_AGAIN),
    Row("`on_save_checkpoint` and `on_load_checkpoint`", model=Remembers),
    Row("… with values that are not tensors", model=RemembersEverything),
    Row("`transfer_batch_to_device` and the hooks around it", data=Transfers),
    Row("a DataModule with a `state_dict`", data=StatefulData),
    Row(
        "`on_train_epoch_end` and `on_train_end` change weights",
        model=Shrinks,
    ),
    Row("a moving average of the weights in the module", model=OwnAverage),
    Row("`configure_gradient_clipping`", model=ClipsItself),
    Row("`backward` and `optimizer_zero_grad`", model=OwnBackward),
    Row("`on_train_epoch_start` changes weights", model=DrawsInHooks),
)
