"""The order of the data: a function of (seed, epoch), never of the number of ranks or workers.

Every DataLoader of a run passes through ``in_order``. Its ``batch_size`` is the global batch, the samples of one step
over all ranks; batch *i* is the same set of samples on 1, 2 or 64 ranks, and each rank takes a consecutive slice of it.
What is random in a sample (augmentation) is seeded with (seed, epoch, index), so it does not matter either which
process prepares it.
"""

import copy
import itertools
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lockstep.core import World
from lockstep.data.sampling import EpochSampler, GlobalBatchSampler
from lockstep.data.seeding import SeededDataset
from lockstep.distributed import STOP_SIGNALS, block_signals

log = logging.getLogger(__name__)


class WorkerInit:
    """Makes a DataLoader's worker leave signals to its rank: one to the whole job is not for it to die of.

    Args:
        then: What the loader's owner wants done in a worker.
        in_job: Whether Slurm may signal the whole job; elsewhere SIGTERM is what Python ends a worker with.
    """

    def __init__(self, then: Callable[[int], None] | None, in_job: bool) -> None:
        self.then, self.in_job = then, in_job

    def __call__(self, worker: int) -> None:
        block_signals(*STOP_SIGNALS if self.in_job else (signal.SIGINT,))
        if self.then is not None:
            self.then(worker)


class SkipFirstBatches:
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
class DataSharding:
    """How a run shares out its data: the world and the seed."""

    world: World
    seed: int
    _warned: set[str] = field(default_factory=set, compare=False)

    def shard(self, loader: Any, name: str = "DataLoader", whole: bool = False) -> Any:
        """``loader`` in the run's order, giving only this rank's samples.

        Left alone: what is no DataLoader, an IterableDataset, a loader with a batch sampler or a DistributedSampler of
        its own, and one without batches (``batch_size=None``). With several ranks a warning says so, once.

        Args:
            loader: What a ``*_dataloader`` hook returned.
            name: How messages call it.
            whole: Keep the last, smaller batch, whatever ``drop_last`` says.
        """
        if not isinstance(loader, DataLoader) or isinstance(loader.batch_sampler, GlobalBatchSampler):
            return loader
        if reason := self._why_not(loader):
            if self.world.size > 1 and self.world.is_rank_zero and reason not in self._warned:
                self._warned.add(reason)
                log.warning(
                    "%s is left alone because it has %s: it has to give each of the %d ranks its own samples itself.",
                    name,
                    reason,
                    self.world.size,
                )
            return loader
        order = EpochSampler(loader.sampler, self.seed)  # type: ignore[arg-type]
        assert loader.batch_size is not None
        batches = GlobalBatchSampler(order, loader.batch_size, loader.drop_last and not whole, self.world, name)
        # A copy keeps the loader's class and everything else that was set on it; __init__ could not be called again for
        # a subclass, and __setattr__ refuses these names.
        ordered = copy.copy(loader)
        vars(ordered).update(
            dataset=SeededDataset(loader.dataset, self.seed),
            sampler=order,
            batch_sampler=batches,
            # Its own, or every start of an epoch would draw the workers' seed from the generator that drives dropout.
            generator=loader.generator or torch.Generator(),
            worker_init_fn=WorkerInit(loader.worker_init_fn, self.world.launcher in ("slurm", "submitit")),
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
