"""The order of the data: a function of (seed, epoch), never of the number of ranks or workers.

Every DataLoader of a run passes through ``in_order``. Its ``batch_size`` is the global batch, the samples of one step
over all ranks; batch *i* is the same set of samples on 1, 2 or 64 ranks, and each rank takes a consecutive slice of it.
What is random in a sample (augmentation) is seeded with (seed, epoch, index), so it does not matter either which
process prepares it.
"""

import copy
import itertools
import logging
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lockstep.errors import UsageError
from lockstep.stop import STOPPING, ignore_signals
from lockstep.world import World

log = logging.getLogger(__name__)

Draw = tuple[int, int]
"""One sample of one epoch: (epoch, index)."""


@dataclass(frozen=True)
class Position:
    """A place in the data.

    Attributes:
        epoch: Number of the epoch, from 0.
        batch: Batches of it that are used up.
    """

    epoch: int
    batch: int


def mix(*parts: int) -> int:
    """A 64-bit seed from ``parts``: equal for equal parts, unrelated otherwise (splitmix64, Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def seed_cpu(seed: int) -> None:
    """Seed torch on the CPU, numpy and random with a 64-bit number, in about 8 µs.

    Not ``torch.manual_seed``: that also visits every accelerator and alone takes some 130 µs.
    """
    torch.default_generator.manual_seed(seed >> 1)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave torch (CPU), numpy and random afterwards as they were."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


class Order(Sampler[int]):
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
        seed = mix(self.seed, self.epoch) >> 1
        if type(self.source) is RandomSampler and not self.source.replacement and self.source._num_samples is None:
            generator = torch.Generator().manual_seed(seed)
            return torch.randperm(len(self), generator=generator).tolist()
        with random_state_kept():
            seed_cpu(seed)
            if isinstance(own := getattr(self.source, "generator", None), torch.Generator):
                own.manual_seed(seed)
            return list(self.source)


class GlobalBatches(BatchSampler):
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

    def __init__(self, order: Order, batch_size: int, drop_last: bool, world: World, name: str = "DataLoader") -> None:
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

    def __iter__(self) -> Iterator[list[Draw]]:  # type: ignore[override]
        epoch, indices = self.order.epoch, self.order.indices()
        for batch in range(self.start[1] if self.start[0] == epoch else 0, len(self)):
            start, end = self._mine(batch)
            yield [(epoch, index) for index in indices[start:end]]


class Seeded(Dataset[Any]):
    """A dataset whose randomness (torch, numpy, random) depends on (seed, epoch, index) alone.

    A dataset with a true attribute ``deterministic`` promises to use none, and is fetched by its own ``__getitems__``
    if it has one. The random state of the process is left as it was.

    Args:
        dataset: The map-style dataset to read from.
        seed: The run's seed.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not yet there while unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, draw: Draw) -> Any:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[Draw]) -> Any:
        """The samples of ``draws``, in their order."""
        if getattr(self.dataset, "deterministic", False):
            indices = [index for _, index in draws]
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]
        with random_state_kept():
            return [self._seeded(*draw) for draw in draws]

    def _seeded(self, epoch: int, index: int) -> Any:
        seed_cpu(mix(self.seed, epoch, index))
        return self.dataset[index]


class Quiet:
    """Makes a DataLoader's worker leave signals to its rank: one to the whole job is not for it to die of.

    Args:
        then: What the loader's owner wants done in a worker.
        in_job: Whether Slurm may signal the whole job; elsewhere SIGTERM is what Python ends a worker with.
    """

    def __init__(self, then: Callable[[int], None] | None, in_job: bool) -> None:
        self.then, self.in_job = then, in_job

    def __call__(self, worker: int) -> None:
        ignore_signals(*STOPPING if self.in_job else (signal.SIGINT,))
        if self.then is not None:
            self.then(worker)


class Later:
    """A loader that is not ours, without its first batches when it is iterated for the first time.

    Args:
        loader: Any iterable of batches.
        batches: How many are drawn and dropped.
    """

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self._batches = loader, batches

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not yet there while unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        first, self._batches = self._batches, 0
        return itertools.islice(iter(self.loader), first, None)


@dataclass(frozen=True)
class Sharding:
    """How a run shares out its data: the world and the seed."""

    world: World
    seed: int
    _warned: set[str] = field(default_factory=set, compare=False)

    def in_order(self, loader: Any, name: str = "DataLoader", whole: bool = False) -> Any:
        """``loader`` in the run's order, giving only this rank's samples.

        Left alone: what is no DataLoader, an IterableDataset, a loader with a batch sampler or a DistributedSampler of
        its own, and one without batches (``batch_size=None``). With several ranks a warning says so, once.

        Args:
            loader: What a ``*_dataloader`` hook returned.
            name: How messages call it.
            whole: Keep the last, smaller batch, whatever ``drop_last`` says.
        """
        if not isinstance(loader, DataLoader) or isinstance(loader.batch_sampler, GlobalBatches):
            return loader
        if reason := self._why_not(loader):
            if self.world.size > 1 and self.world.is_zero and reason not in self._warned:
                self._warned.add(reason)
                log.warning(
                    "%s is left alone because it has %s: it has to give each of the %d ranks its own samples itself.",
                    name,
                    reason,
                    self.world.size,
                )
            return loader
        order = Order(loader.sampler, self.seed)  # type: ignore[arg-type]
        assert loader.batch_size is not None
        batches = GlobalBatches(order, loader.batch_size, loader.drop_last and not whole, self.world, name)
        # A copy keeps the loader's class and everything else that was set on it; __init__ could not be called again for
        # a subclass, and __setattr__ refuses these names.
        ordered = copy.copy(loader)
        vars(ordered).update(
            dataset=Seeded(loader.dataset, self.seed),
            sampler=order,
            batch_sampler=batches,
            # Its own, or every start of an epoch would draw the workers' seed from the generator that drives dropout.
            generator=loader.generator or torch.Generator(),
            worker_init_fn=Quiet(loader.worker_init_fn, self.world.launcher in ("slurm", "submitit")),
            _iterator=None,
        )
        return ordered

    @staticmethod
    def _why_not(loader: DataLoader[Any]) -> str | None:
        if isinstance(loader.dataset, IterableDataset):
            return "an IterableDataset"
        if loader.batch_sampler is None:
            return "no batches (batch_size=None)"
        if type(loader.batch_sampler) is not BatchSampler:
            return f"a batch sampler of its own ({type(loader.batch_sampler).__name__})"
        if isinstance(loader.sampler, DistributedSampler):
            return "a DistributedSampler"
        return None
