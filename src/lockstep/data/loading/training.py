"""The training data of a run: one loader or several, from any position in an epoch."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from lightning.pytorch import Trainer

from lockstep.compat.lightning import LightningCombinedLoader, overridden_iteration, split_combination, training_loader
from lockstep.core import UsageError
from lockstep.data.loading.generators import reseed_generators
from lockstep.data.loading.sampling import DataPosition, length_or_none
from lockstep.data.loading.seeding import RandomStream, derive_seed
from lockstep.data.loading.sharding import DataSharding, ShardedLoader
from lockstep.data.loading.stream_passes import StreamPass, open_pass
from lockstep.data.loading.streams import StreamMark, set_stream_epoch


@dataclass(frozen=True)
class TrainingBatch:
    """What is known about a batch of training, which holds one batch of each loader.

    Attributes:
        positions: Position in each loader after the batch.
        weight: This rank's share of the samples times the number of ranks.
        samples: Samples of all ranks; None if a loader is not sharded.
        marks: For each loader, how to return to the position of its stream; None for one without a state.
    """

    positions: tuple[DataPosition, ...]
    weight: float = 1.0
    samples: int | None = 0
    marks: tuple[StreamMark | None, ...] = ()


class LoaderPasses:
    """The passes of one epoch over a loader, from a position on; each iteration is one pass.

    Attributes:
        position: Position after the newest batch.
        weight, samples, mark: Those of the newest batch; see ``TrainingBatch``.
    """

    def __init__(
        self, loader: Any, position: DataPosition, sharding: DataSharding, saved: Mapping[str, Any] | None = None
    ) -> None:
        self.loader, self.position, self.sharding = loader, position, sharding
        self.weight, self.samples = 1.0, None if not isinstance(loader, ShardedLoader) else 0
        self.mark: StreamMark | None = None
        self._saved, self._is_first = saved, True

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if not self._is_first:
            self.position = DataPosition(self.position.epoch, self.position.cycle + 1)
        self._is_first = False
        if isinstance(self.loader, ShardedLoader):
            with self.loader.global_batches.starting_at(self.position):
                batches: Iterator[Any] = iter(self.loader)
                if isinstance(batches, Generator):  # of a user's ``__iter__``: it begins to read with its first batch
                    batches = chain([*islice(batches, 1)], batches)
            return self._count_samples(batches, self.loader.global_batches.drawn_sizes)
        position, world = self.position, self.sharding.world
        place = position.epoch, position.cycle
        set_stream_epoch(self.loader, *place)
        stream = RandomStream(derive_seed(self.sharding.seed, world.rank, *place))
        with stream.active():
            reseed_generators(self.loader, derive_seed(self.sharding.seed, *place), keep_seed=True)
            marked = open_pass(self.loader, place, stream)
            batches = iter(self.loader) if marked is None else iter(())
        if marked is None:
            return self._count_batches(batches, stream)
        marked.seek(position.used, self._saved)
        self._saved, self.mark = None, marked.mark
        return self._count_marked(marked)

    @property
    def plan(self) -> tuple[int, int] | None:
        """Samples of all ranks from the position on, and in a batch; None if the loader is not sharded or has no length."""
        batches = self.loader.global_batches if isinstance(self.loader, ShardedLoader) else None
        if batches is None or batches.samples is None:
            return None
        left = batches.samples - self.position.used
        return left - left % batches.batch_size if batches.drop_last else left, batches.batch_size

    def _count_samples(self, batches: Iterator[Any], drawn_sizes: deque[int]) -> Iterator[Any]:
        sampler = self.loader.global_batches
        for batch in batches:
            self.samples = drawn_sizes.popleft() if drawn_sizes else sampler.size_after(self.position.used)
            self.weight = sampler.rank_weight(self.samples)
            self._advance(self.samples)
            yield batch
        self.samples, self.weight = 0, 1.0

    def _count_batches(self, batches: Iterator[Any], stream: RandomStream) -> Iterator[Any]:
        """The batches of a loader that is not sharded; those before the position are read and dropped."""
        end = object()
        with stream.active():
            for _ in range(self.position.used):
                next(batches, end)
        while True:
            with stream.active():
                batch = next(batches, end)
            if batch is end:
                return
            self._advance(1)
            yield batch

    def _count_marked(self, batches: StreamPass) -> Iterator[Any]:
        """The batches of a stream that has a state."""
        for batch, self.mark in batches:
            self._advance(1)
            yield batch
        if self.mark is not None:
            self.mark = replace(self.mark, has_ended=True)

    def finish(self) -> None:
        """Seek to the saved position of a pass that is over, and read to its end if training had reached that."""
        if self._saved is not None:
            has_ended, rest = self._saved["has_ended"], iter(self)
            if has_ended:
                deque(rest, maxlen=0)

    def _advance(self, used: int) -> None:
        self.position = DataPosition(self.position.epoch, self.position.cycle, self.position.used + used)


class TrainingLoader(LightningCombinedLoader):
    """Combines the loaders of training as ``CombinedLoader`` does, starts each one at its position and reports on each batch.

    Args:
        loaders: What ``train_dataloader`` returns.
        sharding: That of the run.
        epoch: Returns the number of the epoch.
        start: Positions at which iteration starts in their epoch, one for each loader; other epochs start at their first
            batch.
        streams: The ``stream_records`` in the checkpoint of ``start``.

    Raises:
        UsageError: The loaders cannot be combined in training, ``start`` has another number of loaders, or another number of
            ranks saved the state of a stream.
    """

    def __init__(
        self,
        loaders: Any,
        sharding: DataSharding,
        epoch: Callable[[], int],
        start: Sequence[DataPosition] = (),
        streams: Sequence[Mapping[str, Any] | None] = (),
    ) -> None:
        if (method := overridden_iteration(loaders)) is not None:
            raise UsageError(
                f"data: train_dataloader returns a {type(loaders).__name__}, which defines {method}; lockstep resumes the "
                "loaders of a CombinedLoader at their positions, but not custom iteration. Return a "
                "CombinedLoader, or combine the data in a Dataset."
            )
        super().__init__(*split_combination(loaders))
        self.sharding, self.epoch, self.start = sharding, epoch, tuple(start)
        self._passes: list[LoaderPasses] = []
        self._batches: deque[TrainingBatch] = deque(maxlen=2)  # one may be fetched ahead
        self._streams, self._has_resumed = list(streams), False
        self._length: int | None = None  # on all ranks
        self._ends_together = False  # whether ranks may have different numbers of batches, as a loader is not sharded
        if self.mode == "sequential":
            raise UsageError(
                "data: train_dataloader returns a CombinedLoader with mode 'sequential', which Lightning does not train with; "
                "use a ConcatDataset, or mode 'max_size_cycle', 'max_size' or 'min_size'."
            )
        if self.start and len(self.start) != len(self.flattened):
            raise UsageError(
                f"data: train_dataloader returns {len(self.flattened)} loaders, but the checkpoint was saved with "
                f"{len(self.start)}; resume with the same loaders."
            )
        for saved in filter(None, self._streams):
            if saved["ranks"] != sharding.world.size:
                raise UsageError(
                    f"data: {saved['ranks']} ranks have saved the state of a stream, each of its own part, which "
                    f"{sharding.world.size} ranks cannot share; resume with {saved['ranks']}, or start a new run with "
                    "ckpt_path, which reads streams from their start."
                )

    def __iter__(self) -> "TrainingLoader":
        epoch = self.epoch()
        positions = [point if point.epoch == epoch else DataPosition(epoch) for point in self.start]
        positions = positions or [DataPosition(epoch)] * len(self.flattened)
        is_resumed = bool(self.start) and self.start[0].epoch == epoch
        saved = self._streams or [None] * len(self.flattened)
        if not is_resumed:
            for loader, point, stream in zip(self.flattened, self.start, saved, strict=False):
                if not self._has_resumed:  # the checkpoint was saved at the end of an epoch
                    LoaderPasses(loader, point, self.sharding, stream).finish()
            saved, self._streams = [None] * len(saved), []
        self._has_resumed = True
        self._passes = [
            LoaderPasses(loader, position, self.sharding, stream)
            for loader, position, stream in zip(self.flattened, positions, saved, strict=True)
        ]
        self._check_weights()
        self._batches.clear()
        self.start_iteration(self._passes, [position.cycle > 0 for position in positions])
        self._batches.append(TrainingBatch(tuple(positions), marks=tuple(passes.mark for passes in self._passes)))
        self._ends_together = self.sharding.end.is_needed and not all(
            isinstance(loader, ShardedLoader) for loader in self.flattened
        )
        if self._ends_together:
            self._length = None  # the length below is that of this rank alone
            self._length = self.sharding.end.shortest(self._epoch_name, length_or_none(self))
        return self

    @property
    def _epoch_name(self) -> str:
        return f"epoch {self.epoch() + 1} of training"

    def __len__(self) -> int:
        return super().__len__() if self._length is None else self._length

    def _check_weights(self) -> None:
        """Raise UsageError if the ranks would need different weights for different loaders."""
        plans = [passes.plan for passes in self._passes]
        for number, (passes, plan) in enumerate(zip(self._passes, plans, strict=True)):
            rest = plan[0] % plan[1] if plan is not None and len(set(plans)) > 1 else 0
            if rest % self.sharding.world.size:
                raise UsageError(
                    f"{passes.loader.global_batches.name}: the last batch of train loader {number + 1} of {len(plans)} has "
                    f"{rest} samples, which {self.sharding.world.size} ranks cannot share evenly, and a loss over several "
                    "loaders has one weight for all of them; set drop_last=True, or choose another batch_size."
                )

    def __next__(self) -> Any:
        batch = super().__next__() if not self._ends_together else self._next_on_all_ranks()
        samples = [passes.samples for passes in self._passes]
        total = None if None in samples else sum(filter(None, samples))
        weights = {passes.weight for passes in self._passes if passes.samples} or {1.0}
        if len(weights) > 1:  # a sampler without a length has ended with a smaller batch
            raise UsageError(
                f"data: the train loaders have batches of {', '.join(map(str, samples))} samples in one step, which "
                f"{self.sharding.world.size} ranks cannot share with one weight for all; set drop_last=True."
            )
        (weight,) = weights
        positions = tuple(passes.position for passes in self._passes)
        marks = tuple(passes.mark for passes in self._passes) if total is None else ()
        self._batches.append(TrainingBatch(positions, weight, total, marks))
        return batch

    def _next_on_all_ranks(self) -> Any:
        """The next batch, if all ranks have one."""
        used, batch = max(passes.position.used for passes in self._passes), None
        with suppress(StopIteration):
            batch = super().__next__()
        if ended := self.sharding.end.ended_ranks(batch is None):
            self.sharding.end.report(self._epoch_name, ended, used)
            raise StopIteration
        return batch

    def stream_records(self, ahead: int) -> list[dict[str, Any] | None]:
        """For a checkpoint after the batch of ``newest(ahead)``: the record of each loader that has a state."""
        batch, ranks = self.newest(ahead), self.sharding.world.size
        records: list[dict[str, Any] | None] = []
        for passes, position, mark in zip(self._passes, batch.positions, batch.marks, strict=False):
            if mark is not None and passes.position == position and passes.mark is not None:
                mark = replace(mark, has_ended=passes.mark.has_ended)
            records.append(None if mark is None else mark.record(ranks))
        return records if any(records) else []

    def newest(self, ahead: int) -> TrainingBatch:
        """The batch that was delivered ``ahead`` batches before the newest one."""
        return self._batches[max(-1 - ahead, -len(self._batches))]

    def batches_done(self) -> int | None:
        """The batches of the epoch before ``start``, as if all had the size that they have now; None if it is unknown."""
        batches = [loader.global_batches for loader in self.flattened if isinstance(loader, ShardedLoader)]
        if len(batches) < len(self.flattened) or any(each.samples is None for each in batches):
            return None
        left = [each.batches_left(at.used) if at.cycle == 0 else 0 for each, at in zip(batches, self.start, strict=True)]
        return self.combine_counts([len(each) for each in batches]) - self.combine_counts(left)


def current_batch(trainer: Trainer) -> TrainingBatch | None:
    """The batch that ``trainer`` trains on or trained on last; None without lockstep's loops."""
    loader, ahead = training_loader(trainer)
    return loader.newest(ahead) if isinstance(loader, TrainingLoader) else None


def stream_records(trainer: Trainer) -> list[dict[str, Any] | None]:
    """For a checkpoint: the record of each loader of training that has a state; empty if none has."""
    loader, ahead = training_loader(trainer)
    return loader.stream_records(ahead) if isinstance(loader, TrainingLoader) else []


def preparation_times(trainer: Trainer) -> tuple[int, tuple[float, float, float]]:
    """Workers of the training loaders of this rank, and the sums of their ``ShardedLoader.preparation_times``."""
    loader, _ = training_loader(trainer)
    found = [] if loader is None else loader.flattened
    sums = [each.preparation_times for each in found if isinstance(each, ShardedLoader)] or [(0.0, 0.0, 0.0)]
    busy, read, samples = map(sum, zip(*sums, strict=True))
    return sum(getattr(each, "num_workers", 0) for each in found), (busy, read, samples)
