"""Tiny modules and data that do not import lockstep. A job imports a copy of this file from its own folder."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

VERSION = "as submitted"


class ToyModel(LightningModule):
    """A regression with dropout, a metric object, means and maxima over epochs, and a plateau schedule.

    Args:
        seconds: Time added to each step.
        word: Text that each rank prints, with its place, before it trains.
    """

    def __init__(self, seconds: float = 0.0, word: str = "") -> None:
        super().__init__()
        self.seconds, self.word = seconds, word
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1))
        self.mean = MeanMetric()

    def on_fit_start(self) -> None:
        if self.word:
            node = getattr(self.trainer.strategy, "node_rank", 0)  # a single device has none
            place = f"{VERSION}: rank {self.global_rank} node {node} local {self.local_rank}"
            print(f"{place} on {os.environ['SLURMD_NODENAME']} says {self.word!r}", flush=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.seconds)
        loss = self._loss(batch)
        self.mean(loss.detach())
        self.log("train/mean", self.mean, on_step=False, on_epoch=True)
        self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("train/most", loss, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch), sync_dist=True)

    def _loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}


class TwoOptimizers(ToyModel):
    """One optimizer per layer."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.layers[0], self.layers[3])]


class TiedAndFrozen(ToyModel):
    """A frozen layer in the optimizer, a tied layer, no dropout, and a parameter outside the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].requires_grad_(False)
        self.layers[2] = nn.Identity()
        self.tied = self.layers[3]
        self.not_optimized = nn.Parameter(torch.ones(3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.not_optimized.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.layers[0].parameters(), *self.layers[3].parameters()], lr=0.02, eps=1e-4)


class WideAndFrozen(ToyModel):
    """A large layer, and a large frozen layer in the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 900), nn.ReLU(), nn.Linear(900, 700), nn.Linear(700, 800), nn.Linear(800, 1))
        self.layers[2].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, eps=1e-4)


class ToyData(LightningDataModule):
    """Random points with four coordinates, and the sum of these as target; the global batch size is 12.

    Args:
        samples: Samples for training, and as many for validation.
        workers: Workers of each DataLoader.
        diary: Folder that gets a file per call of prepare_data and setup.
    """

    def __init__(self, samples: int = 240, workers: int = 1, diary: str | None = None) -> None:
        super().__init__()
        self.samples, self.workers, self.diary = samples, workers, diary

    def _record(self, call: str) -> None:
        if self.diary is not None:
            Path(self.diary).mkdir(exist_ok=True)
            (Path(self.diary) / f"{call}-{os.environ.get('RANK', '0')}-{time.time_ns()}").touch()

    def prepare_data(self) -> None:
        self._record("prepare")

    def setup(self, stage: str) -> None:
        self._record("setup")

    def _loader(self, seed: int, shuffle: bool) -> DataLoader[Any]:
        x = torch.randn(self.samples, 4, generator=torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=12, shuffle=shuffle, num_workers=self.workers)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(1, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(2, shuffle=False)
