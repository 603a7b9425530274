"""The order of the samples: samplers for many sizes and numbers of ranks, then real loaders with workers."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
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
    WeightedRandomSampler,
    get_worker_info,
)

from lockstep.core.errors import UsageError
from lockstep.core.world import World
from lockstep.data.loading.sampling import GlobalBatchSampler
from lockstep.data.loading.seeding import derive_seed
from lockstep.data.loading.sharding import DataSharding

RANKS = range(1, 9)


def batches_of_all_ranks(
    samples: int, batch_size: int, size: int, is_training: bool, drop_last: bool = False, epoch: int = 0
) -> list[list[list[int]]]:
    """The indices of each batch of each rank."""
    found = []
    for rank in range(size):
        sampler = (RandomSampler if is_training else SequentialSampler)(range(samples))
        source = BatchSampler(sampler, batch_size, drop_last)
        batches = GlobalBatchSampler(source, World(rank, size, rank, size), 5, is_training, epoch=lambda: epoch)
        found.append([[index for *_, index in batch] for batch in batches])
        assert len(found[-1]) == len(batches)
        used = 0
        for batch in found[-1]:
            assert batches.rank_weight(batches.size_after(used)) == pytest.approx(len(batch) * size / batches.size_after(used))
            used += batches.size_after(used)
    return found


def test_the_order_of_an_epoch_never_changes() -> None:
    (first,), (second,) = (batches_of_all_ranks(8, 8, 1, is_training=True, epoch=epoch) for epoch in (0, 1))
    assert (first, second) == ([[1, 7, 6, 4, 2, 0, 3, 5]], [[5, 3, 0, 6, 1, 7, 4, 2]])


@pytest.mark.parametrize("size", RANKS)
def test_evaluation_counts_each_sample_once_with_equally_many_batches_on_every_rank(size: int) -> None:
    for samples in range(size, 68):
        for batch_size in (1, 4, 8, 64):
            ranks = batches_of_all_ranks(samples, batch_size, size, is_training=False)
            assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(samples))
            assert len({len(batches) for batches in ranks}) == 1
            assert all(batch for batches in ranks for batch in batches)


@pytest.mark.parametrize("size", RANKS)
def test_training_shards_are_disjoint_and_cover_the_whole_set(size: int) -> None:
    for samples in range(size, 68):
        batch_size = size * max(1, 8 // size)
        if 0 < samples % batch_size < size:
            with pytest.raises(UsageError, match="fewer than the"):
                batches_of_all_ranks(samples, batch_size, size, is_training=True)
            continue
        ranks = batches_of_all_ranks(samples, batch_size, size, is_training=True)
        assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(samples))
        assert len({len(batches) for batches in ranks}) == 1


@pytest.mark.parametrize("samples", range(1, 8))
def test_more_ranks_than_samples_raises_error(samples: int) -> None:
    with pytest.raises(UsageError, match=f"8 ranks are more than its {samples} samples"):
        batches_of_all_ranks(samples, 8, 8, is_training=False)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_global_batch_holds_the_same_samples_on_any_number_of_ranks(size: int) -> None:
    alone = batches_of_all_ranks(67, 16, 1, is_training=True, drop_last=True)[0]
    together = batches_of_all_ranks(67, 16, size, is_training=True, drop_last=True)
    joined = [[index for rank in together for index in rank[number]] for number in range(len(alone))]
    assert joined == alone
    assert len(alone) == 4


def test_every_epoch_and_seed_has_its_own_order() -> None:
    def first(epoch: int) -> list[int]:
        return [index for batch in batches_of_all_ranks(64, 16, 1, is_training=True, epoch=epoch)[0] for index in batch]

    assert first(0) == first(0)
    assert first(0) != first(1)
    assert len({derive_seed(seed, epoch) for seed in range(100) for epoch in range(100)}) == 10_000


class Noisy(Dataset[tuple[int, float, float, float]]):
    """Each sample is its index and a random number of each kind."""

    classes: list[str]

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, torch.rand(()).item(), np.random.rand(), random.random()


def all_samples(loader: DataLoader[Any], world: World, epoch: int = 0) -> list[tuple[float, ...]]:
    """Every sample that this rank sees in one epoch."""
    sharded = DataSharding(world, seed=3).shard(loader, epoch=lambda: epoch)
    return [tuple(float(column[row]) for column in batch) for batch in sharded for row in range(len(batch[0]))]


def test_a_plain_loader_gets_the_same_samples_and_augmentation_on_any_number_of_ranks_and_workers() -> None:
    alone = all_samples(DataLoader(Noisy(), batch_size=8, shuffle=True), World())
    assert len(set(alone)) == 24
    for workers in (0, 1, 2):
        ranks = [
            all_samples(DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=workers), World(rank, 2, rank, 2))
            for rank in range(2)
        ]
        assert sorted(ranks[0] + ranks[1]) == sorted(alone)
    assert sorted(all_samples(DataLoader(Noisy(), batch_size=8, shuffle=True), World(), epoch=1)) != sorted(alone)


def test_persistent_workers_follow_the_epoch() -> None:
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=1, persistent_workers=True)
    seen: list[list[tuple[float, ...]]] = []
    sharded = DataSharding(World(), seed=3).shard(loader, epoch=lambda: len(seen))
    for _ in range(2):
        seen.append([tuple(float(c[row]) for c in batch) for batch in sharded for row in range(8)])
    assert seen == [all_samples(DataLoader(Noisy(), batch_size=8, shuffle=True), World(), epoch) for epoch in (0, 1)]


def test_loading_restores_the_random_state() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist(), random.getstate()
    all_samples(DataLoader(Noisy(), batch_size=8, shuffle=True), World())
    assert torch.equal(before[0], torch.get_rng_state())
    assert (np.random.get_state(legacy=False)["state"]["key"].tolist(), random.getstate()) == before[1:]


def test_a_custom_sampler_is_sharded() -> None:
    def drawn(world: World) -> list[int]:
        sampler = WeightedRandomSampler([1.0] * 12 + [5.0] * 12, 16)
        return [int(sample[0]) for sample in all_samples(DataLoader(Noisy(), batch_size=8, sampler=sampler), world)]

    alone, ranks = drawn(World()), [drawn(World(rank, 2, rank, 2)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == sorted(alone)
    assert len(alone) == 16


class Custom(DataLoader[Any]):
    """A custom loader class."""

    def __init__(self, extra: str, **arguments: Any) -> None:
        super().__init__(Noisy(), **arguments)
        self.extra = extra


def test_a_custom_loader_class_is_kept() -> None:
    sharded = DataSharding(World(0, 2, 0, 2), 1).shard(Custom("mine", batch_size=8, shuffle=True))
    assert isinstance(sharded, Custom) and type(sharded).__name__ == "Custom"
    assert sharded.extra == "mine"
    assert len(list(sharded)) == len(sharded) == 3


class Stream(IterableDataset[int]):
    """A dataset without indices and length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (DataLoader(Stream(), batch_size=2), "an IterableDataset"),
        (DataLoader(Noisy(), batch_size=None), "no batches"),
        (
            DataLoader(Noisy(), batch_sampler=type("Mine", (BatchSampler,), {})(range(4), 2, False)),
            "its own batch sampler (Mine)",
        ),
        (DataLoader(Noisy(), sampler=DistributedSampler(Noisy(), 2, 0)), "a DistributedSampler"),
    ],
)
def test_a_loader_that_cannot_be_sharded_is_returned_with_a_warning(
    loader: DataLoader[Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert DataSharding(World(0, 2, 0, 2), 1).shard(loader, "MyData") is loader
    assert f"MyData is not sharded because it has {reason}" in caplog.text
    caplog.clear()
    assert DataSharding(World(), 1).shard(loader) is loader
    assert DataSharding(World(1, 2, 1, 2), 1).shard(loader) is loader
    assert caplog.text == ""


def test_other_objects_are_returned_unchanged() -> None:
    assert DataSharding(World(0, 2, 0, 2), 1).shard([1, 2, 3]) == [1, 2, 3]


class Words(Dataset[tuple[str, float]]):
    """Samples by name, with a random number and an attribute that callbacks may change."""

    level = 0

    def __getitem__(self, word: Any) -> tuple[str, float]:
        return f"{word} {self.level}", torch.rand(()).item()


class Shuffled(Sampler[Any]):
    """Names or pairs in an order that torch's generator and the epoch choose; it counts what it hears."""

    def __init__(self, words: list[Any]) -> None:
        self.words, self.epochs = words, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.words[index] for index in torch.randperm(len(self.words))])


@pytest.mark.parametrize(
    "words", [list("abcdefgh"), [(number, "x") for number in range(8)], list(np.arange(8)), list(torch.arange(8))]
)
def test_a_sampler_may_yield_anything(words: list[Any]) -> None:
    def drawn(world: World) -> list[tuple[str, float]]:
        loader = DataLoader(Words(), batch_size=4, sampler=Shuffled(words))
        return [
            sample
            for names, numbers in DataSharding(world, 3).shard(loader)
            for sample in zip(names, numbers.tolist(), strict=True)
        ]

    alone, ranks = drawn(World()), [drawn(World(rank, 2, rank, 2)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == sorted(alone)
    assert sorted(name for name, _ in alone) == sorted(f"{word} 0" for word in words)
    assert len({number for _, number in alone}) == 8


def _show_level(_: int) -> None:
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, Words)
    info.dataset.level += 1


@pytest.mark.parametrize("workers", [0, 1])
def test_users_see_and_change_their_own_loader_dataset_and_sampler(workers: int) -> None:
    dataset, sampler = Words(), Shuffled(list("abcd"))
    loader = DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=workers, worker_init_fn=_show_level)
    sharded = DataSharding(World(), 3).shard(loader)
    seen = (sharded.dataset, sharded.sampler, sharded.batch_sampler, sharded.worker_init_fn, sharded.generator)
    assert all(
        own is given for own, given in zip(seen, (dataset, sampler, loader.batch_sampler, _show_level, None), strict=True)
    )
    sharded.dataset.level = 6
    assert {name.split()[1] for names, _ in sharded for name in names} == {str(6 + workers)}
    sharded.collate_fn = len
    sharded.batch_sampler.batch_size = 2
    assert (list(sharded), len(sharded)) == ([2, 2], 2)


def mixed(samples: list[int]) -> tuple[list[int], float]:
    """A batch and a random number, as MixUp draws one."""
    return samples, torch.rand(()).item()


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_a_collate_fn_depend_on_the_position_alone(workers: int) -> None:
    def numbers(epoch: int) -> list[float]:
        loader: DataLoader[Any] = DataLoader(range(12), batch_size=4, num_workers=workers, collate_fn=mixed)  # type: ignore[arg-type]
        return [number for _, number in DataSharding(World(), 5).shard(loader, epoch=lambda: epoch)]

    first = numbers(0)
    torch.rand(7)
    assert numbers(0) == first and len({*first, *numbers(1)}) == 6
