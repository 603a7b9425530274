"""Passes over streams that have a state, from any position; a resume is verified by one batch that is read again."""

import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from lockstep.core import UsageError
from lockstep.data.loading.seeding import RandomStream
from lockstep.data.loading.streams import (
    Snapshot,
    SnapshotClock,
    StatefulLoader,
    StreamMark,
    StreamProgress,
    fingerprint,
    is_stateful,
    own_random_numbers,
)

log = logging.getLogger(__name__)

Place = tuple[int, int]
"""An epoch, and the number of a pass in it."""


class StreamPass:
    """One pass over a stream; iterates over its batches, each with its ``StreamMark``.

    Attributes:
        mark: That of the newest batch.
    """

    mark: StreamMark | None = None

    def __iter__(self) -> Iterator[tuple[Any, StreamMark]]:
        while (item := self.read()) is not None:
            self.mark = item[1]
            yield item

    def read(self) -> tuple[Any, StreamMark] | None:
        """The next batch and its mark; None at the end."""
        raise NotImplementedError

    def begin(self) -> None:
        """Seek to the first batch."""
        raise NotImplementedError

    def load(self, saved: Mapping[str, Any]) -> int:
        """Load the states in ``saved``, a record of a ``StreamMark``; return how many batches to drop after that."""
        raise NotImplementedError

    def seek(self, used: int, saved: Mapping[str, Any] | None) -> None:
        """Seek to the batch after the first ``used`` ones, by the states in ``saved`` if they restore that position."""
        if saved is None:
            self.begin()
            self._drop(used)
            return
        if self.restore(saved):
            return
        if saved["after"] is not None:  # the pass did not start at the initial state of the stream
            self.load({**saved, "starts": [saved["after"]], "dropped": 0, "chosen": 0})
            return
        if not self.can_rewind:
            log.warning("%s; the samples after this restart differ from those of a run without it", self._wrong_state)
            return
        text = "%s (is there a shuffle buffer?); the %d batches of the epoch so far are read again and dropped"
        log.warning(text, self._wrong_state, used)
        self.begin()
        self._drop(used)
        if self.mark is None or self.mark.check != saved["check"]:
            text = "data: %s gives other samples when it is read again; those after this restart differ from a run without it"
            log.warning(text, self.name)

    @property
    def _wrong_state(self) -> str:
        return f"data: the state_dict of {self.name} does not restore the same batch"

    @property
    def name(self) -> str:
        """The class of the stream, for messages."""
        raise NotImplementedError

    @property
    def can_rewind(self) -> bool:
        """Whether ``begin`` works after ``load``."""
        return False

    def restore(self, saved: Mapping[str, Any]) -> bool:
        """Load the states in ``saved``; return whether the newest batch is the one before the restart."""
        return self._verify(self.load(saved), saved["check"])

    def _verify(self, dropped: int, check: int) -> bool:
        """Drop ``dropped`` batches; return whether the last of them has the fingerprint ``check``."""
        self._drop(dropped)
        return not dropped or (self.mark is not None and self.mark.check == check)

    def _drop(self, number: int) -> None:
        self.mark = None
        for _ in range(number):
            if (item := self.read()) is None:
                self.mark = None
                return
            self.mark = item[1]


class LoaderPass(StreamPass):
    """A pass over a loader that has a ``state_dict``, such as torchdata's StatefulDataLoader.

    Args:
        stream: The random numbers that the loader draws in this process.
    """

    def __init__(self, loader: Any, stream: RandomStream) -> None:
        self._loader, self._stream, self._clock = loader, stream, SnapshotClock()
        self._number = 0
        self._snapshots: tuple[Snapshot, ...] = ()
        self._random: tuple[Any, ...] = ()
        self._batches: Iterator[Any] = iter(())

    @property
    def name(self) -> str:
        return type(self._loader).__name__

    def begin(self) -> None:
        with self._stream.active():
            self._batches = iter(self._loader)

    def load(self, saved: Mapping[str, Any]) -> int:
        _check_processes(saved, 1)
        self._number, state, dropped = saved["starts"][0]
        if state is not None:
            self._loader.load_state_dict(deepcopy(state))
        self.begin()
        if saved["chosen"] >= 0:
            self._stream.restore(saved["random"][saved["chosen"]])
            self._snapshots, self._random = ((self._number, state),), (self._stream.state,)
        return int(dropped + saved["dropped"])

    def read(self) -> tuple[Any, StreamMark] | None:
        end = object()
        with self._stream.active():
            batch = next(self._batches, end)
            state = None if batch is end else self._clock.take(self._loader)
        if batch is end:
            return None
        self._number += 1
        if state is not None:
            self._snapshots = (*self._snapshots[-1:], (self._number, state))
            self._random = (*self._random[-1:], self._stream.state)
        return batch, StreamMark((self._number,), (self._snapshots,), fingerprint(batch), self._random)


class DatasetPass(StreamPass):
    """A pass over a DataLoader whose iterable dataset has a ``state_dict``."""

    def __init__(self, loader: StatefulLoader, place: Place) -> None:
        self._loader, self._place = loader, place
        self._progress = StreamProgress(max(1, loader.num_workers))
        self._batches: Iterator[Any] = iter(())
        self._is_untouched = True

    @property
    def name(self) -> str:
        return type(self._loader.dataset).__name__

    @property
    def can_rewind(self) -> bool:
        return self._is_untouched

    def begin(self, starts: list[Any] | None = None, dataset: Any = None) -> None:
        self._progress = StreamProgress(max(1, self._loader.num_workers))
        if starts is not None:
            self._progress.resume(starts)
        with own_random_numbers(self._loader):
            self._batches = iter(self._loader.read(*self._place, starts or (), dataset))

    def load(self, saved: Mapping[str, Any], dataset: Any = None) -> int:
        workers = max(1, self._loader.num_workers)
        _check_processes(saved, workers)
        self.begin(deepcopy(saved["starts"]), dataset)
        return int(saved["dropped"])

    def restore(self, saved: Mapping[str, Any]) -> bool:
        if self._loader.num_workers:  # each worker has a copy of the dataset
            is_restored = self._try(saved, None)
            if not is_restored:
                self._loader.forget_workers()
            return is_restored
        try:
            copied = deepcopy(self._loader.dataset)
        except Exception:  # a user's object may raise anything when it is copied
            self._is_untouched = False
            return super().restore(saved)
        return self._try(saved, copied) and super().restore(saved)

    def _try(self, saved: Mapping[str, Any], dataset: Any) -> bool:
        """Whether ``saved`` restores the batch before the restart; without workers, tried on ``dataset``, a copy."""
        try:
            return self._verify(self.load(saved, dataset), saved["check"])
        except UsageError:
            raise
        except Exception as error:  # a stream may raise anything at its own state, such as datasets 5.2 in workers
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            log.warning("data: %s cannot load its own state (%s)", self.name, reason)
            return False

    def read(self) -> tuple[Any, StreamMark] | None:
        with own_random_numbers(self._loader):
            item = next(self._batches, None)
        if item is None:
            return None
        batch, note = item
        return batch, self._progress.advance(note)


def open_pass(loader: Any, place: Place, stream: RandomStream) -> StreamPass | None:
    """A pass over ``loader``; None if it has no state."""
    if isinstance(loader, StatefulLoader):
        return DatasetPass(loader, place)
    return LoaderPass(loader, stream) if is_stateful(loader) else None


def _check_processes(saved: Mapping[str, Any], number: int) -> None:
    if len(saved["starts"]) != number:
        raise UsageError(
            f"data: num_workers={number} reads a stream that {len(saved['starts'])} workers read before, and each has saved a "
            f"state of its own; resume with num_workers={len(saved['starts'])}, or start a new run."
        )
