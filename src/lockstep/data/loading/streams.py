"""Streams that resume by their own state: iterable datasets with ``state_dict`` and ``load_state_dict``.

The process that reads a stream is ahead of training, so its state travels with each batch, as in torchdata's
StatefulDataLoader. Random numbers are seeded for each batch, so that no state of a generator needs to travel.
"""

import functools
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lockstep.compat.torch import InternalsDataLoader
from lockstep.data.loading.seeding import derive_seed, pack_rng_state, preserve_rng_state, seed_cpu

_SNAPSHOT_SHARE = 0.01
"""Fraction of the time that may be spent on ``state_dict``; a resume reads the batches since the last state again."""

_HASHED = 256
"""Elements of a tensor that its fingerprint covers."""


def is_stateful(value: object) -> bool:
    """Whether ``value`` has the protocol of a stream that resumes."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def fingerprint(batch: Any, start: int = 0) -> int:
    """A checksum of some elements of each tensor in ``batch``, and of its other items, in some microseconds."""
    if isinstance(batch, Tensor) and batch.is_nested:
        batch = batch.unbind()
    if isinstance(batch, Tensor):
        flat = batch.detach().reshape(-1) if batch.layout == torch.strided else batch.detach().to_dense().reshape(-1)
        chosen = flat[:: max(1, len(flat) // _HASHED)].resolve_conj().resolve_neg().contiguous().cpu()
        return zlib.crc32(chosen.view(torch.uint8).numpy().tobytes(), zlib.crc32(str(tuple(batch.shape)).encode(), start))
    if isinstance(batch, np.ndarray) and batch.dtype.hasobject is False:
        return zlib.crc32(np.ascontiguousarray(batch.reshape(-1)[:: max(1, batch.size // _HASHED)]).tobytes(), start)
    if isinstance(batch, Mapping):
        batch = [item for pair in batch.items() for item in pair]
    if isinstance(batch, list | tuple):
        return functools.reduce(lambda so_far, item: fingerprint(item, so_far), batch, start)
    if is_dataclass(batch) and not isinstance(batch, type):
        return fingerprint([getattr(batch, part.name) for part in fields(batch)], start)
    known = batch if isinstance(batch, str | bytes | int | float | bool | None) else type(batch).__name__
    return zlib.crc32(repr(known).encode(), start)


class SnapshotClock:
    """Decides when to take the next snapshot, from the duration of the last one."""

    def __init__(self) -> None:
        self._next = 0.0

    def take(self, owner: Any) -> Any:
        """The state of ``owner``, independent of what it does later; None if it is too early."""
        begin = time.perf_counter()
        if begin < self._next:
            return None
        state = deepcopy(owner.state_dict())
        end = time.perf_counter()
        self._next = end + (end - begin) / _SNAPSHOT_SHARE
        return state


Snapshot = tuple[int, Any]
"""How many batches one process has read of a stream, and the state of the stream after them; None: its initial state."""


@dataclass(frozen=True)
class StreamMark:
    """How to return to the position of a stream after a batch.

    Attributes:
        counts: Batches of this pass that each process has read and training has used.
        snapshots: The newest two snapshots of each process.
        check: The fingerprint of the newest batch.
        random: For a loader that has a ``state_dict``, the random state at each snapshot.
        has_ended: Whether the pass is over.
    """

    counts: tuple[int, ...]
    snapshots: tuple[tuple[Snapshot, ...], ...]
    check: int = 0
    random: tuple[Any, ...] = ()
    has_ended: bool = False

    def record(self, ranks: int) -> dict[str, Any]:
        """The entry of a checkpoint of ``ranks`` ranks: plain values and the user's states."""
        base = max(self.counts) - 1  # processes take turns: each has delivered this many batches, or has ended before
        starts, chosen = [], 0
        for count, snapshots in zip(self.counts, self.snapshots, strict=True):
            known = [(number, state) for number, state in snapshots if number <= min(count, base)]
            number, state = known[-1] if known else (0, None)
            starts.append([number, state, min(count, base) - number])
            chosen = snapshots.index((number, state)) if known else -1
        after = self.snapshots[0][0] if self.counts == (1,) and self.snapshots[0] else None
        return {
            "ranks": ranks,
            "starts": starts,
            "dropped": sum(max(0, count - base) for count in self.counts),
            "check": self.check,
            "random": [pack_rng_state(state) for state in self.random],
            "chosen": chosen,
            "after": after and [after[0], after[1], 0],
            "has_ended": self.has_ended,
        }


@dataclass(frozen=True)
class Note:
    """What travels with a batch: its process, the batches of the pass so far, and the state of the stream if it was taken."""

    worker: int
    number: int
    state: Any
    check: int


class StreamReader(IterableDataset[Any]):
    """The samples of ``dataset`` in one process, from where a run resumes.

    Args:
        batch_size: Samples of a batch; None if the dataset yields batches.
        place: Epoch and number of the pass in it, in shared memory: persistent workers read it when a pass begins.
        seed: Seed of the run and the rank.
        starts: For each process: the batches at its snapshot, the state, and the batches to read and drop after them. Only for
            the first pass.
    """

    def __init__(
        self, dataset: Any, batch_size: int | None, place: Tensor, seed: int, starts: Sequence[tuple[int, Any, int]]
    ) -> None:
        self.dataset, self.place, self.seed = dataset, place, seed
        self.batch_size, self.starts = batch_size or 1, starts
        self.clock = SnapshotClock()
        self.number, self.is_over = 0, False

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        self.number, state, dropped = self.starts[worker] if self.starts else (0, None, 0)
        self.starts, self.is_over, first = (), False, self.number + dropped
        if callable(set_epoch := getattr(self.dataset, "set_epoch", None)):  # of a persistent worker's copy
            set_epoch(stream_epoch(*self.place.tolist()))
        if state is not None:
            self.dataset.load_state_dict(state)
        seed, samples, end = derive_seed(self.seed, *self.place.tolist(), worker), iter(self.dataset), object()
        while True:
            seed_cpu(derive_seed(seed, self.number))
            for _ in range(self.batch_size):
                if (sample := next(samples, end)) is end:
                    self.is_over = True
                    return
                if self.number >= first:
                    yield sample
            self.number += 1


class StreamCollate:
    """``collate`` with a ``Note`` on each batch of the ``reader`` in the same process."""

    def __init__(self, collate: Callable[[Any], Any], reader: StreamReader) -> None:
        self.collate, self.reader = collate, reader

    def __call__(self, samples: Any) -> tuple[Any, Note]:
        reader, info = self.reader, get_worker_info()
        batch = self.collate(samples)
        # After its last sample a stream may have returned to its start.
        state = None if reader.is_over else reader.clock.take(reader.dataset)
        return batch, Note(0 if info is None else info.id, reader.number + 1, state, fingerprint(batch))


class StatefulLoader(InternalsDataLoader):
    """A base class that a DataLoader of a stateful stream gets besides its own class: each of its batches has a ``Note``.

    Attributes:
        seed: Seed of the run and the rank.
        place: See ``StreamReader``.
        start_worker: Called in each worker, instead of ``worker_init_fn``.
    """

    seed: int
    place: Tensor
    start_worker: Callable[[int], None]
    _reader: StreamReader | None = None
    _replaced: Any = None
    _starts: Sequence[tuple[int, Any, int]] = ()

    def internals(self) -> dict[str, Any]:
        dataset = self.dataset if self._replaced is None else self._replaced
        reader = StreamReader(dataset, self.batch_size, self.place, self.seed, self._starts)
        return {
            "dataset": reader,
            "collate_fn": StreamCollate(self.collate_fn, reader),
            "generator": self.generator or torch.Generator(),
            "worker_init_fn": self.start_worker,
        }

    def read(self, epoch: int, cycle: int, starts: Sequence[tuple[int, Any, int]] = (), dataset: Any = None) -> Iterator[Any]:
        """The batches of a pass with their notes, from ``starts`` on and by new workers if it is given.

        Args:
            dataset: Read instead of the loader's own.
        """
        self.place.copy_(torch.tensor([epoch, cycle]))
        previous = self._starts, self._replaced
        vars(self).update(_starts=starts, _replaced=dataset)
        if starts:
            self.forget_workers()
        try:
            return super().__iter__()
        finally:
            vars(self).update(zip(("_starts", "_replaced"), previous, strict=True))

    def forget_workers(self) -> None:
        """End persistent workers; the next pass starts new ones."""
        vars(self)["_iterator"] = None

    def __iter__(self) -> Any:
        """The batches alone, for the user."""
        return (batch for batch, _ in self.read(0, 0))


class StreamProgress:
    """The progress of each of the ``workers`` processes that read a stream, in one pass."""

    def __init__(self, workers: int) -> None:
        self._counts = [0] * workers
        self._snapshots: list[tuple[Snapshot, ...]] = [()] * workers

    def resume(self, starts: Sequence[tuple[int, Any, int]]) -> None:
        """Start from the ``starts`` of a checkpoint."""
        self._counts = [number + dropped for number, _, dropped in starts]
        self._snapshots = [((number, state),) if state is not None else () for number, state, _ in starts]

    def advance(self, note: Note) -> StreamMark:
        """Count the batch of ``note``."""
        self._counts[note.worker] = note.number
        if note.state is not None:
            self._snapshots[note.worker] = (*self._snapshots[note.worker][-1:], (note.number, note.state))
        return StreamMark(tuple(self._counts), tuple(self._snapshots), note.check)


def set_stream_epoch(loader: Any, epoch: int, cycle: int) -> None:
    """Call ``set_epoch`` of an iterable dataset, by which it shuffles; further passes in an epoch have other numbers."""
    dataset = getattr(loader, "dataset", None)
    set_epoch = getattr(dataset, "set_epoch", None)
    if isinstance(dataset, IterableDataset) and callable(set_epoch):
        set_epoch(stream_epoch(epoch, cycle))


def stream_epoch(epoch: int, cycle: int) -> int:
    """The number of an epoch that a stream gets."""
    return epoch + 1_000_000 * cycle


@contextmanager
def own_random_numbers(loader: DataLoader[Any]) -> Iterator[None]:
    """Restore the random state of this process after the block if it reads the stream itself, without workers."""
    if loader.num_workers:
        yield
    else:
        with preserve_rng_state():
            yield
