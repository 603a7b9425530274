"""Samplers and batch samplers."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from support.runs import Outcome
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from foreign.base import BATCH_SIZE, SAMPLES, Points, Regression, Row, points

OWN_ORDER = "the order of a shuffled epoch depends only on seed and epoch"


class Numbered(Dataset[Any]):
    """Points with their numbers."""

    def __init__(self) -> None:
        self.points = points()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return *self.points[index], int(index)


class Counting(Regression):
    """Logs the number of samples of an epoch, and the sum of their numbers and of the squares of these."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, numbers = batch
        for power in range(3):
            sums = (numbers.double() ** power).sum()
            self.log(f"samples/{power}", sums, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        return super().training_step((x, y), batch_idx)


def counts(*numbers: int) -> Any:
    """A check that each epoch trains the samples with these ``numbers`` once."""
    expected = torch.tensor(numbers, dtype=torch.float64)

    def check(run: Outcome) -> None:
        for power in range(3):
            assert set(run.series(f"samples/{power}")) == {float((expected**power).sum())}

    return check


EACH_ONCE = counts(*range(SAMPLES))


class NumberedPoints(Points):
    """A subclass says how its loader draws samples."""

    def loader(self, **options: Any) -> Any:
        return DataLoader(Numbered(), **{"batch_size": BATCH_SIZE, "num_workers": self.workers, **options})


class Shuffled(NumberedPoints):
    def train_dataloader(self) -> Any:
        return self.loader(shuffle=True)


class Replaced(NumberedPoints):
    def train_dataloader(self) -> Any:
        return self.loader(sampler=RandomSampler(range(SAMPLES), replacement=True, num_samples=40))


class Weighted(NumberedPoints):
    def train_dataloader(self) -> Any:
        weights = torch.linspace(0.1, 1, SAMPLES).tolist()
        return self.loader(sampler=WeightedRandomSampler(weights, SAMPLES))


class Subset(NumberedPoints):
    def train_dataloader(self) -> Any:
        return self.loader(sampler=SubsetRandomSampler(range(8, 32)))


class Batches(NumberedPoints):
    def train_dataloader(self) -> Any:
        return DataLoader(
            Numbered(), batch_sampler=BatchSampler(SequentialSampler(range(SAMPLES)), BATCH_SIZE, drop_last=False)
        )


class ShuffledBatches(NumberedPoints):
    def train_dataloader(self) -> Any:
        return DataLoader(Numbered(), batch_sampler=BatchSampler(RandomSampler(range(SAMPLES)), BATCH_SIZE, drop_last=False))


class Backwards(Sampler[Any]):
    """Numbers from the last to the first, rotated by the epoch, as ``kind``; no ``__len__``."""

    def __init__(self, kind: Any = int) -> None:
        self.kind, self.epoch = kind, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for number in reversed(range(SAMPLES)):
            yield self.kind((number + self.epoch) % SAMPLES)


class BackwardsWithLength(Backwards):
    def __len__(self) -> int:
        return SAMPLES


class WithoutLength(NumberedPoints):
    def train_dataloader(self) -> Any:
        return self.loader(sampler=Backwards())


class SetsEpoch(NumberedPoints):
    def train_dataloader(self) -> Any:
        return self.loader(sampler=BackwardsWithLength())


class NumpyIntegers(NumberedPoints):
    def train_dataloader(self) -> Any:
        return self.loader(sampler=BackwardsWithLength(np.int64))


class TensorIndices(NumberedPoints):
    def train_dataloader(self) -> Any:
        return self.loader(sampler=BackwardsWithLength(torch.tensor))


class OwnBatches(Sampler[list[int]]):
    """Batches of neighbours in an order that torch's generator draws."""

    def __len__(self) -> int:
        return SAMPLES // BATCH_SIZE

    def __iter__(self) -> Iterator[list[int]]:
        for batch in torch.randperm(len(self)).tolist():
            yield list(range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE))


class OwnBatchSampler(NumberedPoints):
    def train_dataloader(self) -> Any:
        return DataLoader(Numbered(), batch_sampler=OwnBatches())


class PlainBatches:
    """Like ``OwnBatches``, without a base class and with a generator of its own."""

    def __init__(self) -> None:
        self.random = random.Random(3)

    def __len__(self) -> int:
        return SAMPLES // BATCH_SIZE

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.random.sample(range(len(self)), len(self)):
            yield list(range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE))


class PlainBatchSampler(NumberedPoints):
    def train_dataloader(self) -> Any:
        return DataLoader(Numbered(), batch_sampler=PlainBatches())


class Distributed(NumberedPoints):
    def train_dataloader(self) -> Any:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return self.loader(batch_size=BATCH_SIZE // world, sampler=DistributedSampler(Numbered(), world, rank, shuffle=True))


ROWS = (
    Row("`shuffle=True`", model=Counting, data=Shuffled, own_order=OWN_ORDER, check=EACH_ONCE),
    Row("`RandomSampler` with replacement", model=Counting, data=Replaced, own_order=OWN_ORDER, kill_step=8),
    Row("`WeightedRandomSampler`", model=Counting, data=Weighted, own_order=OWN_ORDER),
    Row("`SubsetRandomSampler`", model=Counting, data=Subset, own_order=OWN_ORDER, kill_step=5, check=counts(*range(8, 32))),
    Row("`batch_sampler=BatchSampler(SequentialSampler(…))`", model=Counting, data=Batches, check=EACH_ONCE),
    Row(
        "`batch_sampler=BatchSampler(RandomSampler(…))`",
        model=Counting,
        data=ShuffledBatches,
        own_order=OWN_ORDER,
        check=EACH_ONCE,
    ),
    Row("a custom sampler without `__len__`", model=Counting, data=WithoutLength, check=EACH_ONCE),
    Row(
        "a custom sampler with `set_epoch`",
        model=Counting,
        data=SetsEpoch,
        check=EACH_ONCE,
    ),
    Row("a sampler that yields numpy integers", model=Counting, data=NumpyIntegers, check=EACH_ONCE),
    Row("a sampler that yields tensors", model=Counting, data=TensorIndices, check=EACH_ONCE),
    Row(
        "a custom batch sampler that draws from torch's generator",
        model=Counting,
        data=OwnBatchSampler,
        own_order=OWN_ORDER,
        per_rank="each rank takes all batches",
    ),
    Row(
        "a custom batch sampler without a base class, with a generator in an attribute",
        model=Counting,
        data=PlainBatchSampler,
        own_order=OWN_ORDER,
        logged_per_rank="each rank takes all batches",
    ),
    Row(
        "a custom `DistributedSampler`",
        model=Counting,
        data=Distributed,
        own_order=OWN_ORDER,
        per_rank="the sampler's order depends on the ranks",
        check=EACH_ONCE,
    ),
)
