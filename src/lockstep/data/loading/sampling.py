"""The order of the samples: a function of (seed, epoch), whatever the number of ranks and workers.

The ``batch_size`` of a DataLoader is the global batch size: the samples of one step over all ranks. Global batch *i* holds the
same samples on 1, 2 or 64 ranks, and each rank takes a consecutive slice of it.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from lockstep.core import UsageError, World
from lockstep.data.loading.generators import reseed_generators
from lockstep.data.loading.order import SequentialOrder, ShuffledOrder
from lockstep.data.loading.seeding import RandomStream, SampleKey, derive_seed


@dataclass(frozen=True)
class DataPosition:
    """A position in the training data of one loader.

    Attributes:
        epoch: Number of the epoch, from 0.
        cycle: Complete passes over the loader in this epoch; more than 0 if it is shorter than another one.
        used: Samples of all ranks used in this pass; of a loader that is not sharded, its batches used on each rank.
    """

    epoch: int
    cycle: int = 0
    used: int = 0


def length_or_none(value: Any) -> int | None:
    """The length of a sampler or loader; None if it has none."""
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


class GlobalBatchSampler:
    """This rank's slices of the global batches of a loader, as lists of ``SampleKey``.

    All ranks have the same number of batches, each with at least one sample. Together they have every sample of the epoch
    once, except those that ``drop_last`` drops. In a smaller batch some ranks may have one sample more than others;
    ``rank_weight`` corrects the mean over ranks. In evaluation, a last batch with fewer samples than ranks is joined to the
    batch before it.

    Args:
        source: The loader's batch sampler. Its ``RandomSampler`` is replaced by a permutation keyed with (seed, epoch); any
            other sampler runs with random numbers seeded with (seed, epoch). It may yield anything that its dataset accepts.
        world: The ranks that share the batches.
        seed: Seed of the run.
        is_training: Whether the ranks must share all batches evenly, except the last one of an epoch.
        keeps_last: Whether ``drop_last`` is ignored.
        epoch: Returns the number of the epoch.
        name: The owner of the loader, for messages.

    Attributes:
        drawn_sizes: Samples of all ranks in each batch of the newest iteration that is not consumed yet, if only the sampler
            knows the order; its consumer removes them.

    Raises:
        UsageError: In training, the ranks cannot share the batches; or there are fewer samples than ranks.
    """

    def __init__(
        self,
        source: BatchSampler,
        world: World,
        seed: int,
        is_training: bool = False,
        keeps_last: bool = False,
        epoch: Callable[[], int] = lambda: 0,
        name: str = "DataLoader",
    ) -> None:
        self.source, self.world, self.seed, self.epoch, self.name = source, world, seed, epoch, name
        self.is_training, self.keeps_last = is_training, keeps_last
        self._start: DataPosition | None = None
        self.drawn_sizes: deque[int] = deque()
        if is_training and (rest := source.batch_size % world.size):
            near = [str(size) for size in (source.batch_size - rest, source.batch_size - rest + world.size) if size]
            raise UsageError(
                f"{name}: batch_size={source.batch_size} is the global batch size and is not divisible by {world.size} ranks; "
                f"use {' or '.join(near)}."
            )
        if (samples := self.samples) is not None:
            self._check_length(samples)

    def _check_length(self, samples: int) -> None:
        """Raise UsageError if the ranks cannot share ``samples``."""
        if samples < self.world.size:
            raise UsageError(f"{self.name}: {self.world.size} ranks are more than its {samples} samples; use fewer ranks.")
        if not self.batches_left(0):
            raise UsageError(
                f"{self.name}: batch_size={self.batch_size} is more than its {samples} samples, and drop_last leaves no batch; "
                "use a smaller batch_size."
            )
        rest = samples % self.batch_size
        if self.is_training and not self.drop_last and 0 < rest < self.world.size:
            self._raise_too_few(rest, f" of {samples}")

    def _raise_too_few(self, rest: int, total: str = "") -> None:
        raise UsageError(
            f"{self.name}: the last batch of an epoch has {rest}{total} samples, fewer than the {self.world.size} "
            "ranks; set drop_last: true or choose another batch_size."
        )

    @property
    def batch_size(self) -> int:
        """Samples of all ranks in a batch; in evaluation rounded up to a multiple of the ranks."""
        return -(-self.source.batch_size // self.world.size) * self.world.size

    @property
    def drop_last(self) -> bool:
        """Whether a last, smaller batch is dropped."""
        return self.source.drop_last and not self.keeps_last

    @property
    def samples(self) -> int | None:
        """Samples of an epoch; None if the sampler has no length."""
        return length_or_none(self.source.sampler)

    def __len__(self) -> int:
        return self.batches_left(0)

    def batches_left(self, used: int) -> int:
        """Number of batches after the first ``used`` samples of a pass; TypeError if the sampler has no length."""
        if self.samples is None:
            raise TypeError(f"the sampler of {self.name} has no length")
        batches, rest = divmod(max(0, self.samples - used), self.batch_size)
        return batches + (rest > 0 and not self.drop_last and (rest >= self.world.size or not batches))

    def size_after(self, used: int) -> int:
        """Samples of all ranks in the batch that follows the first ``used`` samples of a pass."""
        if self.samples is None:
            return self.batch_size
        left = self.samples - used
        is_joined = 0 < left - self.batch_size < self.world.size and not self.drop_last
        return left if is_joined else max(0, min(self.batch_size, left))

    def rank_weight(self, size: int) -> float:
        """This rank's share of a global batch of ``size`` samples times the number of ranks; 1.0 if all shares are equal."""
        start, end = self._slice(size)
        return (end - start) * self.world.size / size

    def _slice(self, size: int) -> tuple[int, int]:
        """This rank's part of a global batch of ``size`` samples."""
        share, extra = divmod(size, self.world.size)
        rank = self.world.rank
        first = rank * share + min(rank, extra)
        return first, first + share + (rank < extra)

    @contextlib.contextmanager
    def starting_at(self, position: DataPosition) -> Iterator[None]:
        """Iterations that begin in the block start at ``position``; others at the first batch of the epoch."""
        self._start = position
        try:
            yield
        finally:
            self._start = None

    def __iter__(self) -> Iterator[list[SampleKey]]:
        self.drawn_sizes = deque()
        return self._batches(self._start or DataPosition(self.epoch()), self.drawn_sizes)

    def _batches(self, position: DataPosition, drawn_sizes: deque[int]) -> Iterator[list[SampleKey]]:
        cycle = [position.cycle] if position.cycle else []  # the first pass of an epoch is a function of (seed, epoch) alone
        seed, used = derive_seed(self.seed, position.epoch, *cycle), position.used
        order, stream = self._order(seed), RandomStream(seed)
        if order is None:
            with stream.active():
                drawn = islice(self._drawn(seed), used, None)
        while True:
            size = self.size_after(used)
            if order is None:
                with stream.active():
                    batch = list(islice(drawn, size))
                size = len(batch)
                drawn_sizes.append(size)
            else:
                size = min(size, len(order) - used)
            if size <= 0 or (self.drop_last and size < self.batch_size):
                return
            if size < self.world.size:
                self._raise_too_few(size)
            start, end = self._slice(size)
            samples = batch[start:end] if order is None else order.read(used + start, used + end, self.batch_size)
            yield list(zip(repeat(seed), range(used + start, used + end), samples, strict=False))
            used += size

    def _order(self, seed: int) -> SequentialOrder | ShuffledOrder | None:
        """The order of one pass; None if only the sampler knows it."""
        sampler: Any = self.source.sampler
        if type(sampler) is SequentialSampler:
            return SequentialOrder(len(sampler))
        if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
            return ShuffledOrder(len(sampler), seed)
        return None

    def _drawn(self, seed: int) -> Iterator[Any]:
        """What the sampler yields in one pass."""
        sampler = self.source.sampler
        reseed_generators(sampler, seed)
        drawn: Iterator[Any] = iter(sampler)
        return drawn
