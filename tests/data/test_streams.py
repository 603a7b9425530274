"""Streams resume by their own state: every position of every kind in this process and its workers, then runs of real ranks."""

import io
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lockstep.core import UsageError, World
from lockstep.data.loading.sampling import DataPosition
from lockstep.data.loading.sharding import DataSharding
from lockstep.data.loading.streams import fingerprint
from lockstep.data.loading.training import TrainingLoader
from lockstep.distributed import destroy_process_group, fork_ranks, init_process_group


class Numbers(IterableDataset[Any]):
    """Numbers with noise, each worker its part; its state is the place in the part.

    Attributes:
        read: Samples that this object has read.
        loaded: States that it has loaded.
    """

    def __init__(self, samples: int = 22) -> None:
        self.samples, self.place, self.epoch = samples, 0, 0
        self.read = self.loaded = 0

    def numbers(self) -> list[int]:
        info = get_worker_info()
        return list(range(self.samples))[0 if info is None else info.id :: 1 if info is None else info.num_workers]

    def sample(self, number: int) -> Any:
        self.read += 1
        return number + 100 * self.epoch + torch.rand(()).item() + random.random() + np.random.rand()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        numbers = self.numbers()
        while self.place < len(numbers):
            self.place += 1
            yield self.sample(numbers[self.place - 1])
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded += 1
        self.place = state["place"]


class Unfair(Numbers):
    """The first worker has fewer samples than the others."""

    def numbers(self) -> list[int]:
        info = get_worker_info()
        return super().numbers()[: 3 if info is not None and info.id == 0 else None]


class Endless(Numbers):
    """A stream that goes on in the next pass where this one ends."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.place += 1
            yield self.sample(self.place)
            if self.place % self.samples == 0:
                return


class Buffered(Numbers):
    """Samples pass a buffer that its state does not hold."""

    def __iter__(self) -> Iterator[Any]:
        buffer: list[Any] = []
        for sample in super().__iter__():
            buffer.append(sample)
            if len(buffer) > 5:
                yield buffer.pop(len(buffer) * 7 // 11)
        yield from buffer


class Forgetful(Buffered):
    """It cannot be copied either."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError


class StatefulLoader:
    """A loader with its place in a ``state_dict``, as torchdata's; it draws random numbers in this process."""

    def __init__(self, batches: int = 7) -> None:
        self.batches, self.place, self.start = batches, 0, 0

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for number in range(start, self.batches):
            self.place = number + 1
            yield torch.rand(3) + number

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["place"]


def load(loaders: Any, saved: Any = ((), ()), epoch: int = 3, world: World | None = None) -> TrainingLoader:
    """The training data of an epoch, resumed from what ``epoch_of`` gives."""
    sharding = DataSharding(world or World(), seed=3)
    combined = TrainingLoader(loaders, sharding, lambda: epoch, *saved)
    combined.flattened = [sharding.shard(loader, is_training=True, epoch=lambda: epoch) for loader in combined.flattened]
    return combined


def epoch_of(loader: TrainingLoader) -> list[tuple[str, Any]]:
    """The batches of an epoch, and what a checkpoint after each holds, written and read."""
    found = []
    for batch, *_ in loader:
        file = BytesIO()
        torch.save(loader.stream_records(0), file)
        file.seek(0)
        found.append((str(batch), (loader.newest(0).positions, torch.load(file, weights_only=True))))
    return found


def batches_of(found: list[tuple[str, Any]]) -> list[str]:
    return [batch for batch, _ in found]


def streams() -> dict[str, Any]:
    """Kinds of streams."""
    return {
        "dataset": DataLoader(Numbers(), batch_size=4),
        "samples": DataLoader(Numbers(5), batch_size=None),
        "drop_last": DataLoader(Numbers(), batch_size=4, drop_last=True),
        "one batch": DataLoader(Numbers(3), batch_size=4),
        "workers": DataLoader(Numbers(), batch_size=2, num_workers=2),
        "persistent workers": DataLoader(Numbers(), batch_size=3, num_workers=2, persistent_workers=True),
        "workers of different parts": DataLoader(Unfair(30), batch_size=2, num_workers=2),
        "endless": DataLoader(Endless(), batch_size=4),
        "buffer": DataLoader(Buffered(), batch_size=4),
        "buffer, with workers": DataLoader(Buffered(), batch_size=3, num_workers=2),
        "loader": StatefulLoader(),
        "several": {"a": DataLoader(Numbers(), batch_size=4), "b": StatefulLoader(3), "c": DataLoader(Numbers(7))},
    }


@pytest.mark.parametrize("kind", streams())
def test_every_stream_resumes_by_its_state(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    undisturbed = load(streams()[kind])
    whole = epoch_of(undisturbed)
    undisturbed.epoch = lambda: 4
    following = batches_of(epoch_of(undisturbed))
    torch.manual_seed(7)  # what the process draws meanwhile changes nothing
    before = torch.get_rng_state()
    every = 4 if "workers" in kind else 1
    for done in range(0, len(whole), every):
        saved = whole[done - 1][1] if done else ((DataPosition(3),) * len(whole[0][1][0]), [])
        resumed = load(streams()[kind], saved)
        found = epoch_of(resumed)
        assert batches_of(found) == batches_of(whole[done:])
        resumed.epoch = lambda: 4
        assert batches_of(epoch_of(resumed)) == following
    assert torch.equal(torch.get_rng_state(), before)
    assert ("does not restore the same batch" in caplog.text) == ("buffer" in kind)


@pytest.mark.parametrize("kind", ["endless", "loader"])
def test_a_stream_resumes_in_and_after_an_epoch_that_is_not_its_first(kind: str) -> None:
    undisturbed = load(streams()[kind])
    epoch_of(undisturbed)
    ended = undisturbed.newest(0).positions, undisturbed.stream_records(0)
    undisturbed.epoch = lambda: 4
    whole = epoch_of(undisturbed)
    for done in range(1, len(whole) + 1):
        assert batches_of(epoch_of(load(streams()[kind], whole[done - 1][1], 4))) == batches_of(whole[done:])
    # A run that had ended with the epoch before goes on for another one.
    assert batches_of(epoch_of(load(streams()[kind], ended, 4))) == batches_of(whole)


def test_a_resume_reads_few_batches_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Timed(Numbers):
        """A sample takes 1 ms, a state 0.1 ms."""

        def sample(self, number: int) -> Any:
            nonlocal now
            now += 1e-3
            return super().sample(number)

        def state_dict(self) -> dict[str, Any]:
            nonlocal now
            now += 1e-4
            return super().state_dict()

    monkeypatch.setattr("lockstep.data.loading.streams.time", SimpleNamespace(perf_counter=lambda: now))
    stream = Timed(400)
    saved = epoch_of(load(DataLoader(Timed(400), batch_size=4)))
    assert now == pytest.approx(0.4 + 34 * 1e-4)  # 100 batches, a state after each third
    next(iter(load(DataLoader(stream, batch_size=4), saved[89][1])))
    assert stream.loaded == 1 and stream.read <= 4 * 5


def test_a_state_that_leads_elsewhere_is_named(caplog: pytest.LogCaptureFixture) -> None:
    saved = epoch_of(load(DataLoader(Forgetful(), batch_size=4)))[3][1]
    epoch_of(load(DataLoader(Forgetful(), batch_size=4), saved))
    assert "Forgetful does not restore the same batch; the samples after this restart differ" in caplog.text
    caplog.clear()
    saved = epoch_of(load(StatefulLoader()))[3][1]
    saved[1][0]["check"] += 1
    epoch_of(load(StatefulLoader(), saved))
    assert "StatefulLoader does not restore the same batch; the samples after this restart differ" in caplog.text
    caplog.clear()
    saved = epoch_of(load(DataLoader(Numbers(), batch_size=4)))[3][1]
    epoch_of(load(DataLoader(Numbers(21), batch_size=4), saved))
    assert not caplog.records
    saved[1][0]["check"] += 1
    epoch_of(load(DataLoader(Numbers(21), batch_size=4), saved))
    assert "Numbers gives other samples when it is read again" in caplog.text


class Refusing(Numbers):
    """It refuses its own state with an error that has no text."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def test_a_stream_that_refuses_its_own_state_is_read_again(caplog: pytest.LogCaptureFixture) -> None:
    whole = epoch_of(load(DataLoader(Refusing(), batch_size=4)))
    rest = epoch_of(load(DataLoader(Refusing(), batch_size=4), whole[3][1]))
    assert batches_of(rest) == batches_of(whole)[4:]
    assert "Refusing cannot load its own state (NotImplementedError)" in caplog.text


def test_other_ranks_and_workers_are_refused() -> None:
    saved = epoch_of(load(DataLoader(Numbers(), batch_size=4)))[2][1]
    with pytest.raises(UsageError, match=r"^data: 1 ranks have saved the state of a stream, .* which 2 ranks cannot share; "):
        load(DataLoader(Numbers(), batch_size=4), saved, world=World(0, 2))
    with pytest.raises(UsageError, match=r"^data: num_workers=2 reads a stream that 1 workers read before, .* num_workers=1"):
        epoch_of(load(DataLoader(Numbers(), batch_size=4, num_workers=2), saved))


@dataclass
class Pair:
    """A batch of user code."""

    images: Any
    labels: Any


def test_a_fingerprint_covers_all_kinds_of_batches() -> None:
    kinds: list[Any] = [torch.rand(3, 300), torch.rand(3, 300).bfloat16(), torch.zeros(0), torch.ones(2) > 0, "text", 3, None]
    kinds += [{"a": torch.rand(2), "b": ["c"]}, {"a": torch.rand(2), "b": ["c"]}, (torch.tensor(1), 2), object(), np.ones(3)]
    kinds += [np.zeros(3), torch.zeros(3, 300), torch.zeros(300, 3), torch.rand(2, dtype=torch.complex64).conj()]
    kinds.append(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged))
    kinds += [Pair(torch.ones(2), 1), Pair(torch.zeros(2), 1)]
    assert len({fingerprint(kind) for kind in kinds}) == len(kinds)
    assert [fingerprint(kind) for kind in kinds] == [fingerprint(kind) for kind in kinds]


class Part(IterableDataset[int]):
    """Some numbers; ``length`` is what it says of their number."""

    def __init__(self, samples: int, length: int | None = None) -> None:
        self.samples, self.length = samples, length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.samples))

    def __len__(self) -> int:
        if self.length is None:
            raise NotImplementedError
        return self.length


def count(loader: Any) -> int:
    """Batches that Lightning would fetch."""
    batches, length, number = iter(loader), sized_len(loader), 0
    while number != length and next(batches, None) is not None:
        number += 1
    return number


def read_uneven(world: World) -> tuple[list[int], list[str]]:
    """How many batches this rank gets of several loaders that are longer on other ranks, and what it logs."""
    log, said = logging.getLogger("lockstep"), io.StringIO()
    log.addHandler(logging.StreamHandler(said))
    init_process_group(world, torch.device("cpu"), timedelta(minutes=1))
    own = 7 - world.rank
    parts = [Part(own), Part(own, own), Part(own, 7)]
    sharding = DataSharding(world, 0)
    loaders: list[Any] = [load(DataLoader(part, batch_size=None), world=world) for part in parts]
    loaders += [sharding.shard(DataLoader(part, batch_size=None)) for part in parts]
    counts = [count(loader) for loader in loaders]
    counts.append(len(epoch_of(load({"even": plain(), "own": DataLoader(Part(own), batch_size=None)}, world=world))))
    destroy_process_group()
    return counts, said.getvalue().splitlines()


def plain() -> DataLoader[Any]:
    return DataLoader(range(6), batch_size=3)  # type: ignore[arg-type]


def test_uneven_ranks_end_an_epoch_together() -> None:
    (counts, said), *others = fork_ranks(read_uneven, nodes=1, ranks=3)
    assert counts == [5, 5, 5, 5, 5, 5, 5] and others == [(counts, [])] * 2
    ends = "data: {} ends after 5 batches on all ranks because rank 2 ended; the other batches of ranks 0, 1 are left out"
    differ = "data: ranks have different numbers of batches for {} (rank 0: 7, rank 1: 6, rank 2: 5); it ends after 5 on all"
    training, evaluation = "epoch 4 of training", "evaluation"
    expected = [differ.format(evaluation), ends.format(training), differ.format(training), ends.format(training)]
    expected += [ends.format(evaluation), ends.format(evaluation), ends.format(training)]
    assert [line.split("; give")[0].split(", the rest")[0] for line in said if "not sharded" not in line] == expected
