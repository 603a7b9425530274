"""The order of the data: a function of (seed, epoch), never of the number of ranks or workers.

Every DataLoader of a run passes through ``in_order``. Its ``batch_size`` is the global batch, the samples of one step
over all ranks; batch *i* is the same set of samples on 1, 2 or 64 ranks, and each rank takes a consecutive slice of it.
What is random in a sample (augmentation) is seeded with (seed, epoch, index), so it does not matter either which
process prepares it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler

from lockstep.core import UsageError, World
from lockstep.data.seeding import SampleKey, derive_seed, preserve_rng_state, seed_cpu


@dataclass(frozen=True)
class DataPosition:
    """A place in the data.

    Attributes:
        epoch: Number of the epoch, from 0.
        batch: Batches of it that are used up.
    """

    epoch: int
    batch: int


class EpochSampler(Sampler[int]):
    """The indices of one epoch in the order in which the whole world uses them.

    Args:
        sampler: Decides the kind of order: ``RandomSampler`` gives a permutation drawn from (seed, epoch),
            ``SequentialSampler`` 0, 1, 2 …; any other sampler is run under a generator seeded with (seed, epoch).
        seed: The run's seed.
    """

    def __init__(self, sampler: Sampler[int], seed: int) -> None:
        self.source = sampler
        self.seed = seed
        self.epoch = 0
        self.shuffled = not isinstance(sampler, SequentialSampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through; lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices())

    def indices(self) -> Sequence[int]:
        """All indices of the current epoch."""
        if isinstance(self.source, SequentialSampler):
            return range(len(self))
        seed = derive_seed(self.seed, self.epoch) >> 1
        if type(self.source) is RandomSampler and not self.source.replacement and self.source._num_samples is None:
            generator = torch.Generator().manual_seed(seed)
            return torch.randperm(len(self), generator=generator).tolist()
        with preserve_rng_state():
            seed_cpu(seed)
            if isinstance(own := getattr(self.source, "generator", None), torch.Generator):
                own.manual_seed(seed)
            return list(self.source)


class GlobalBatchSampler(BatchSampler):
    """This rank's slices of the global batches, as lists of draws.

    All ranks have the same number of batches, each with at least one sample, and together they have every sample of the
    epoch once (less what ``drop_last`` drops). In the last, smaller batch some ranks have one sample more than others:
    ``weight`` is what makes the mean over ranks the mean over samples again. Samples too few to give every rank one
    join the batch before them, in evaluation only; in a shuffled epoch they are refused.

    Args:
        order: Indices of the whole world.
        batch_size: Global batch, in samples.
        drop_last: Leave out the last, smaller batch.
        world: Who shares the batches.
        name: How errors call the loader.

    Raises:
        UsageError: The batch does not divide by the ranks, or there are more ranks than samples.
    """

    def __init__(self, order: EpochSampler, batch_size: int, drop_last: bool, world: World, name: str = "DataLoader") -> None:
        self.sampler = self.order = order  # lightning looks for ``sampler`` to tell it the epoch
        self.drop_last = drop_last
        self.world = world
        if order.shuffled and batch_size % world.size:
            near = sorted({max(1, batch_size // world.size) * world.size, -(-batch_size // world.size) * world.size})
            raise UsageError(
                f"{name}: batch_size={batch_size} is the global batch and does not divide by {world.size} ranks; "
                f"{' or '.join(map(str, near))} would."
            )
        per_rank = -(-batch_size // world.size)
        self.batch_size = per_rank * world.size
        self.start = (0, 0)  # an epoch, and how many of its batches to leave out
        self._bounds = self._split(len(order), name)

    def _split(self, samples: int, name: str) -> list[tuple[int, int]]:
        """The first and the one-past-last position of each global batch."""
        whole, rest = divmod(samples, self.batch_size)
        ends = [self.batch_size * (i + 1) for i in range(whole)]
        if samples < self.world.size:
            raise UsageError(f"{name}: {self.world.size} ranks are more than its {samples} samples; use fewer ranks.")
        if self.drop_last and not ends:
            raise UsageError(
                f"{name}: batch_size={self.batch_size} is more than its {samples} samples and drop_last leaves none; "
                "use a smaller batch_size."
            )
        if rest and not self.drop_last:
            if rest >= self.world.size or not ends:
                ends.append(samples)
            elif self.order.shuffled:
                raise UsageError(
                    f"{name}: the last batch of an epoch has {rest} of {samples} samples, fewer than the {self.world.size} "
                    "ranks; set drop_last: true or choose another batch_size."
                )
            else:
                ends[-1] = samples
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def __len__(self) -> int:
        return len(self._bounds)

    def size(self, batch: int) -> int:
        """Samples of the whole world in global batch number ``batch``."""
        start, end = self._bounds[batch]
        return end - start

    def weight(self, batch: int) -> float:
        """This rank's share of the global batch times the number of ranks; 1.0 where all have as many."""
        start, end = self._mine(batch)
        return (end - start) * self.world.size / self.size(batch)

    def _mine(self, batch: int) -> tuple[int, int]:
        start, end = self._bounds[batch]
        share, more = divmod(end - start, self.world.size)
        rank = self.world.rank
        first = start + rank * share + min(rank, more)
        return first, first + share + (rank < more)

    def __iter__(self) -> Iterator[list[SampleKey]]:  # type: ignore[override]
        epoch, indices = self.order.epoch, self.order.indices()
        for batch in range(self.start[1] if self.start[0] == epoch else 0, len(self)):
            start, end = self._mine(batch)
            yield [(epoch, index) for index in indices[start:end]]
