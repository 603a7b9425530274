"""Shard the batches of any DataLoader over the ranks of a run."""

import functools
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, default_collate, get_worker_info

from lockstep.compat.torch import InternalsDataLoader, add_base_class
from lockstep.core import World
from lockstep.data.loading.sampling import GlobalBatchSampler, length_or_none
from lockstep.data.loading.seeding import SeededCollate, SeededDataset, derive_seed
from lockstep.data.loading.streams import StatefulLoader, is_stateful
from lockstep.data.loading.uneven import EvenLoader, SharedEnd
from lockstep.distributed import STOP_SIGNALS

log = logging.getLogger(__name__)


class ShardedLoader(InternalsDataLoader):
    """A base class that a sharded DataLoader gets besides its own class.

    Its attributes are those of the user's loader, and changes by the user take effect. Only its iterators see the attributes
    that ``internals`` replaces.
    """

    global_batches: GlobalBatchSampler
    blocked_signals: tuple[signal.Signals, ...]
    pins: bool
    _times: Tensor | None = None

    def __len__(self) -> int:
        return len(self.global_batches)

    @property
    def preparation_times(self) -> tuple[float, float, float]:
        """Seconds that workers have spent on preparing samples, how many of them on reading files, and samples; all so far."""
        busy, read, samples = (0.0, 0.0, 0.0) if self._times is None else self._times.sum(0).tolist()
        return busy, read, samples

    def internals(self) -> dict[str, Any]:
        if self._times is None or len(self._times) < self.num_workers:
            times = torch.zeros(max(1, self.num_workers), 3, dtype=torch.float64, device="cpu")
            vars(self)["_times"] = times.share_memory_()  # type: ignore[no-untyped-call]
        assert self._times is not None
        dataset = SeededDataset(self.dataset, self._times)
        is_plain = self.collate_fn is default_collate or getattr(self.collate_fn, "deterministic", False)
        return {
            "dataset": dataset,
            "collate_fn": self.collate_fn if is_plain else SeededCollate(self.collate_fn, dataset),
            "batch_sampler": self.global_batches,
            "pin_memory": self.pin_memory or (self.pins and self.num_workers > 0),
            # Without it, each epoch would draw the seed of the workers from the generator that drives dropout.
            "generator": self.generator or torch.Generator(),
            "worker_init_fn": functools.partial(_init_worker, self.worker_init_fn, self.blocked_signals),
        }


@dataclass(frozen=True)
class DataSharding:
    """Shards the DataLoaders of a run.

    Attributes:
        pins: Whether workers put batches into pinned memory, from which a GPU copies them while it computes.
    """

    world: World
    seed: int
    pins: bool = False
    _warned: set[str] = field(default_factory=set, compare=False)

    @functools.cached_property
    def end(self) -> SharedEnd:
        """Ends epochs on all ranks together."""
        return SharedEnd(self.world)

    def shard(
        self,
        loader: Any,
        name: str = "DataLoader",
        *,
        is_training: bool = False,
        keeps_last: bool = False,
        epoch: Callable[[], int] = lambda: 0,
    ) -> Any:
        """A copy of ``loader``, a ``ShardedLoader``, with this rank's samples only, in the run's order.

        A DataLoader of an IterableDataset, with its own batch sampler or a DistributedSampler, or with ``batch_size=None`` is
        not sharded; several ranks log one warning. In training, it becomes a ``StatefulLoader`` if its IterableDataset has a
        ``state_dict``; in evaluation on several ranks, an ``EvenLoader``. Any other object is returned unchanged.

        Args:
            loader: A DataLoader, or anything else.
            name: The owner of the loader, for messages.
            is_training, keeps_last, epoch: See ``GlobalBatchSampler``.

        Raises:
            UsageError: The ranks cannot share its batches; see ``GlobalBatchSampler``.
        """
        if not isinstance(loader, DataLoader) or isinstance(loader, ShardedLoader):
            return loader
        if reason := _why_unsharded(loader):
            if self.world.size > 1 and self.world.is_rank_zero and reason not in self._warned:
                self._warned.add(reason)
                remedy = f"it must give each of the {self.world.size} ranks different samples itself."
                log.warning("%s is not sharded because it has %s: %s", name, reason, remedy)
            return self._keep_samples(loader, is_training)
        assert isinstance(loader.batch_sampler, BatchSampler)
        sharded = add_base_class(loader, ShardedLoader)
        sharded.global_batches = GlobalBatchSampler(
            loader.batch_sampler, self.world, self.seed, is_training, keeps_last, epoch, name
        )
        sharded.blocked_signals, sharded.pins = self._blocked_signals, self.pins
        return sharded

    def _keep_samples(self, loader: DataLoader[Any], is_training: bool) -> DataLoader[Any]:
        """A loader that is not sharded, made to resume by its state or, in evaluation, to end on all ranks together."""
        if is_training:
            is_plain = type(loader).__iter__ is DataLoader.__iter__ and not is_stateful(loader)
            if not is_plain or not isinstance(loader.dataset, IterableDataset) or not is_stateful(loader.dataset):
                return loader
            stream = add_base_class(loader, StatefulLoader)
            stream.seed = derive_seed(self.seed, self.world.rank)
            stream.place = torch.zeros(2, dtype=torch.int64, device="cpu").share_memory_()  # type: ignore[no-untyped-call]
            stream.start_worker = functools.partial(_init_worker, loader.worker_init_fn, self._blocked_signals)
            return stream
        if not self.end.is_needed:
            return loader
        even = add_base_class(loader, EvenLoader)
        even.end, even.what, even.length = self.end, "evaluation", None
        even.length = self.end.shortest(even.what, length_or_none(even))
        return even

    @property
    def _blocked_signals(self) -> tuple[signal.Signals, ...]:
        # A signal to a whole Slurm job must not kill the workers. Elsewhere they accept SIGTERM, with which torch ends them.
        return STOP_SIGNALS if self.world.launcher in ("slurm", "submitit", "agent") else (signal.SIGINT,)


def _init_worker(own: Callable[[int], None] | None, blocked: tuple[signal.Signals, ...], worker: int) -> None:
    """Block signals in a DataLoader worker, show it the user's dataset, and call the loader's own ``worker_init_fn``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    info: Any = get_worker_info()
    object.__setattr__(info, "dataset", info.dataset.dataset)
    if own is not None:
        own(worker)


def _why_unsharded(loader: DataLoader[Any]) -> str | None:
    if isinstance(loader.dataset, IterableDataset):
        return "an IterableDataset"
    if loader.batch_sampler is None:
        return "no batches (batch_size=None)"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"its own batch sampler ({type(loader.batch_sampler).__name__})"
    if isinstance(loader.batch_sampler.sampler, DistributedSampler):
        return "a DistributedSampler"
    return None
