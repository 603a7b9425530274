"""The order of the samples: a function of (seed, epoch), whatever the number of ranks and workers.

The ``batch_size`` of a DataLoader is the global batch size: the samples of one step over all ranks. Global batch *i* holds the
same samples on 1, 2 or 64 ranks, and each rank takes a consecutive slice of it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler

from lockstep.core import UsageError, World
from lockstep.data.seeding import SampleKey, derive_seed, preserve_rng_state, seed_cpu


@dataclass(frozen=True)
class DataPosition:
    """A position in the training data: the epoch, from 0, and the number of its batches that are already used."""

    epoch: int
    batch: int


class EpochSampler(Sampler[int]):
    """The indices of one epoch for all ranks, in the order in which they are used.

    ``RandomSampler`` gives a permutation drawn from (seed, epoch), ``SequentialSampler`` gives 0, 1, 2 …, and any other sampler
    runs with its random numbers seeded with (seed, epoch).
    """

    def __init__(self, sampler: Sampler[int], seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0
        self.is_shuffled = not isinstance(sampler, SequentialSampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices())

    def indices(self) -> Sequence[int]:
        """All indices of the current epoch."""
        if not self.is_shuffled:
            return range(len(self))
        sampler = self.sampler
        seed = derive_seed(self.seed, self.epoch) >> 1
        if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
            return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        with preserve_rng_state():
            seed_cpu(seed)
            if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
                generator.manual_seed(seed)
            return list(sampler)


class GlobalBatchSampler(BatchSampler):
    """This rank's slices of the global batches, as lists of (epoch, index).

    All ranks have the same number of batches, each with at least one sample. Together they have every sample of the epoch
    once, except those that ``drop_last`` drops. In the last, smaller batch some ranks may have one sample more than others;
    ``rank_weight`` corrects the mean over ranks. In evaluation, a last batch with fewer samples than ranks is joined to the
    batch before it. ``start`` is where iteration starts in that epoch; other epochs start at their first batch.

    Raises:
        UsageError: The batch size is not divisible by the number of ranks, or a shuffled epoch or the data set has too few
            samples to give every rank one.
    """

    def __init__(
        self, epoch_sampler: EpochSampler, batch_size: int, drop_last: bool, world: World, name: str = "DataLoader"
    ) -> None:
        self.sampler = self.epoch_sampler = epoch_sampler  # Lightning calls sampler.set_epoch
        self.drop_last = drop_last
        self.world = world
        self.batch_size = -(-batch_size // world.size) * world.size
        if epoch_sampler.is_shuffled and batch_size != self.batch_size:
            near = [str(size) for size in (self.batch_size - world.size, self.batch_size) if size]
            raise UsageError(
                f"{name}: batch_size={batch_size} is the global batch size and is not divisible by {world.size} ranks; "
                f"use {' or '.join(near)}."
            )
        self.start = DataPosition(0, 0)
        self._bounds = list(itertools.pairwise([0, *self._batch_ends(len(epoch_sampler), name)]))

    def _batch_ends(self, samples: int, name: str) -> list[int]:
        """The position after the last sample of each global batch."""
        ends = list(range(self.batch_size, samples + 1, self.batch_size))
        rest = samples % self.batch_size
        if samples < self.world.size:
            raise UsageError(f"{name}: {self.world.size} ranks are more than its {samples} samples; use fewer ranks.")
        if self.drop_last and not ends:
            raise UsageError(
                f"{name}: batch_size={self.batch_size} is more than its {samples} samples, and drop_last leaves no batch; "
                "use a smaller batch_size."
            )
        if rest and not self.drop_last:
            if rest >= self.world.size or not ends:
                ends.append(samples)
            elif self.epoch_sampler.is_shuffled:
                raise UsageError(
                    f"{name}: the last batch of an epoch has {rest} of {samples} samples, fewer than the {self.world.size} "
                    "ranks; set drop_last: true or choose another batch_size."
                )
            else:
                ends[-1] = samples
        return ends

    def __len__(self) -> int:
        return len(self._bounds)

    def sample_count(self, batch: int) -> int:
        """Samples of all ranks in global batch number ``batch``."""
        start, end = self._bounds[batch]
        return end - start

    def rank_weight(self, batch: int) -> float:
        """This rank's share of the global batch times the number of ranks; 1.0 if all ranks have the same share."""
        start, end = self._rank_bounds(batch)
        return (end - start) * self.world.size / self.sample_count(batch)

    def _rank_bounds(self, batch: int) -> tuple[int, int]:
        start, end = self._bounds[batch]
        share, extra = divmod(end - start, self.world.size)
        rank = self.world.rank
        first = start + rank * share + min(rank, extra)
        return first, first + share + (rank < extra)

    def __iter__(self) -> Iterator[list[SampleKey]]:  # type: ignore[override]
        epoch, indices = self.epoch_sampler.epoch, self.epoch_sampler.indices()
        for batch in range(self.start.batch if self.start.epoch == epoch else 0, len(self)):
            start, end = self._rank_bounds(batch)
            yield [(epoch, index) for index in indices[start:end]]
