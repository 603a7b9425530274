"""A row of the table, and the plain module and data that most rows vary. They do not know lockstep."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from support.runs import Outcome
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

SAMPLES, BATCH_SIZE = 48, 8
"""Six steps an epoch. Rows train two epochs unless they say otherwise."""


class Regression(LightningModule):
    """A small network that learns the sum of four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.05
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


def points(seed: int = 0, samples: int = SAMPLES) -> TensorDataset:
    """``samples`` points with four coordinates, (N, 4), and the sum of these, (N, 1)."""
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1, keepdim=True))


class Points(LightningDataModule):
    """Points in their order, so that a plain Trainer gets the same batches."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers, self.batch_size = workers, BATCH_SIZE

    def dataset(self) -> Dataset[Any]:
        return points()

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset(), batch_size=self.batch_size, num_workers=self.workers)

    def val_dataloader(self) -> Any:
        return DataLoader(points(1), batch_size=BATCH_SIZE)


def nothing_more(run: Outcome) -> None:
    """Check nothing more than every row is checked for."""


@dataclass(frozen=True)
class Row:
    """One way to use Lightning, and what lockstep promises for it.

    By default: the run has the weights and metrics of a plain Trainer, on one rank bit for bit and on two within rounding; two
    ranks that are killed in mid-epoch and resumed have the weights and metrics, bit for bit, of two that are not.

    Attributes:
        use: What the user does, for the page.
        arguments: The user's config, as flags.
        model: Their module.
        data: Their DataModule; None: the module has the loaders.
        kill_step: Step after which rank one is killed.
        refused: The sentence with which lockstep refuses it on two ranks, or part of it, before the first step.
        refused_late: Likewise, but only a step shows it.
        own_order: Why the plain Trainer's figures are not those of lockstep; empty: they are.
        per_rank: Why two ranks have other figures than one; empty: they have not.
        logged_per_rank: Why two ranks log other figures than one, though their weights are equal; empty: they do not.
        measured: Prefixes of metrics that measure time or memory, which no two runs share.
        check: What else must hold for a finished run.
        fails: Why this row does not hold yet.
    """

    use: str
    arguments: str = ""
    model: type[LightningModule] = Regression
    data: type[LightningDataModule] | None = Points
    kill_step: int = 9
    refused: str = ""
    refused_late: str = ""
    own_order: str = ""
    per_rank: str = ""
    logged_per_rank: str = ""
    measured: tuple[str, ...] = ()
    check: Callable[[Outcome], None] = nothing_more
    fails: str = ""
