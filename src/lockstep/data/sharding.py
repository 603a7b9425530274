"""Shard the batches of any DataLoader over the ranks of a run."""

import functools
import itertools
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lockstep.compat.torch import copy_data_loader
from lockstep.core import World
from lockstep.data.sampling import EpochSampler, GlobalBatchSampler
from lockstep.data.seeding import SeededDataset
from lockstep.distributed import STOP_SIGNALS

log = logging.getLogger(__name__)


class SkipFirstBatches:
    """A loader that lockstep does not shard; its first iteration reads and drops the first ``batches`` batches."""

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self._batches = loader, batches

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet while unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches, self._batches = self._batches, 0
        return itertools.islice(iter(self.loader), batches, None)


@dataclass(frozen=True)
class DataSharding:
    """Shards the DataLoaders of a run."""

    world: World
    seed: int
    _warned: set[str] = field(default_factory=set, compare=False)

    def shard(self, loader: Any, name: str = "DataLoader", whole: bool = False) -> Any:
        """A copy of ``loader`` with this rank's samples only, in the run's order; ``whole`` overrides its ``drop_last``.

        These are returned unchanged, with one warning if there are several ranks: a DataLoader of an IterableDataset, with
        its own batch sampler or a DistributedSampler, or with ``batch_size=None``. So is any other object.

        Raises:
            UsageError: The ranks cannot share its batches; see ``GlobalBatchSampler``.
        """
        if not isinstance(loader, DataLoader) or isinstance(loader.batch_sampler, GlobalBatchSampler):
            return loader
        if reason := _why_unsharded(loader):
            if self.world.size > 1 and self.world.is_rank_zero and reason not in self._warned:
                self._warned.add(reason)
                remedy = f"it must give each of the {self.world.size} ranks different samples itself."
                log.warning("%s is not sharded because it has %s: %s", name, reason, remedy)
            return loader
        sampler = EpochSampler(loader.sampler, self.seed)  # type: ignore[arg-type]
        assert loader.batch_size is not None
        # A signal to a whole Slurm job must not kill the workers. Elsewhere they accept SIGTERM, with which torch ends them.
        blocked = STOP_SIGNALS if self.world.launcher in ("slurm", "submitit") else (signal.SIGINT,)
        return copy_data_loader(
            loader,
            dataset=SeededDataset(loader.dataset, self.seed),
            sampler=sampler,
            batch_sampler=GlobalBatchSampler(sampler, loader.batch_size, loader.drop_last and not whole, self.world, name),
            # Without it, each epoch would draw the seed of the workers from the generator that drives dropout.
            generator=loader.generator or torch.Generator(),
            worker_init_fn=functools.partial(_init_worker, loader.worker_init_fn, blocked),
        )


def _init_worker(own: Callable[[int], None] | None, blocked: tuple[signal.Signals, ...], worker: int) -> None:
    """Block signals in a DataLoader worker, then call the loader's own ``worker_init_fn``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    if own is not None:
        own(worker)


def _why_unsharded(loader: DataLoader[Any]) -> str | None:
    if isinstance(loader.dataset, IterableDataset):
        return "an IterableDataset"
    if loader.batch_sampler is None:
        return "no batches (batch_size=None)"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"its own batch sampler ({type(loader.batch_sampler).__name__})"
    if isinstance(loader.sampler, DistributedSampler):
        return "a DistributedSampler"
    return None
