"""Random numbers of samples and batches."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from foreign.base import SAMPLES, Points, Row, points

OWN_NUMBERS = "random numbers of a sample depend on seed, epoch and position"


class Augmented(Dataset[Any]):
    """Points with noise from torch, numpy and python."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = points()[index]
        return x + 0.1 * torch.randn(4) + 0.1 * float(np.random.randn()) + 0.1 * random.random(), y


RNG = np.random.default_rng(5)
"""A generator of the module, as NumPy recommends."""


class Jitter:
    """A transform with a generator of its own."""

    def __init__(self) -> None:
        self.random = {"shift": np.random.default_rng(3)}

    def __call__(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.random["shift"].random() + 0.1 * RNG.random()


class NoisyCollate:
    """A ``collate_fn`` with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)

    def __call__(self, samples: Any) -> Any:
        x, y = default_collate(samples)
        return x, y + 0.1 * torch.rand((), generator=self.generator)


class Transformed(Dataset[Any]):
    def __init__(self) -> None:
        self.points, self.transforms = points(), [Jitter()]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.points[index]
        return self.transforms[0](x), y


class TransformedPoints(Points):
    def train_dataloader(self) -> Any:
        return DataLoader(Transformed(), batch_size=self.batch_size, num_workers=self.workers, collate_fn=NoisyCollate())


class AugmentedPoints(Points):
    def dataset(self) -> Dataset[Any]:
        return Augmented()


ROWS = (
    Row(
        "random augmentation by torch, numpy and python",
        data=AugmentedPoints,
        own_order=OWN_NUMBERS,
    ),
    Row(
        "random augmentation with workers",
        "--data.workers 2",
        data=AugmentedPoints,
        own_order=OWN_NUMBERS,
    ),
    Row(
        "generators of a transform, of a `collate_fn` and of the module",
        data=TransformedPoints,
        own_order=OWN_NUMBERS,
        per_rank="a `collate_fn` draws for each part of a batch",
    ),
    Row(
        "generators of a transform, of a `collate_fn` and of the module, with workers",
        "--data.workers 2",
        data=TransformedPoints,
        own_order=OWN_NUMBERS,
        per_rank="a `collate_fn` draws for each part of a batch",
    ),
)
