"""The random order of samples: golden values, a permutation at every size, statistics, and the cost of a resume."""

import itertools
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from lockstep.core.world import World
from lockstep.data.loading import order
from lockstep.data.loading.order import ShuffledOrder
from lockstep.data.loading.sampling import DataPosition, GlobalBatchSampler
from lockstep.data.loading.seeding import derive_seed

LARGE = 3_000_000_007


def whole(samples: int, key: int) -> NDArray[np.int64]:
    return ShuffledOrder(samples, key).at(np.arange(samples))


def orders(samples: int, keys: int) -> NDArray[np.int64]:
    """The orders of ``keys`` epochs, int64 (keys, samples)."""
    return np.stack([whole(samples, derive_seed(11, epoch)) for epoch in range(keys)])


def chi_square(observed: NDArray[np.int64], expected: float) -> float:
    """Pearson's chi-square in standard deviations from its mean, for counts that all have the same expectation."""
    freedom = observed.size - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_the_order_is_the_same_on_every_machine() -> None:
    assert whole(10, 7).tolist() == [9, 5, 2, 3, 7, 8, 1, 0, 4, 6]
    assert ShuffledOrder(70_000, 7).at(np.arange(5)).tolist() == [67958, 40573, 17371, 5788, 53480]
    last = ShuffledOrder(LARGE, 7).at(np.arange(LARGE - 3, LARGE))
    assert last.tolist() == [942685461, 311816184, 1603045133]
    assert ShuffledOrder(2**62 + 3, 7).at(np.arange(1)).tolist() == [2063469998771240393]


@pytest.mark.parametrize("least", [order._SORTED, 0])
def test_every_size_gives_a_permutation(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(order, "_SORTED", least)  # with 0, small sizes take the Feistel network too
    for samples in itertools.chain(range(2, 5001), (2**16 - 1, 2**16, 2**16 + 1, 100_003)):
        assert np.array_equal(np.sort(whole(samples, samples)), np.arange(samples)), samples
    assert whole(1, 3).tolist() == [0]


def test_a_large_order_never_repeats_a_sample_or_leaves_the_range() -> None:
    drawn = ShuffledOrder(LARGE, 5).at(np.random.default_rng(0).choice(LARGE // 1000, 100_000, replace=False) * 1000)
    assert len(np.unique(drawn)) == 100_000
    assert drawn.min() >= 0 and LARGE * 0.999 < drawn.max() < LARGE


def test_all_orders_of_a_few_samples_are_equally_frequent() -> None:
    counts = Counter(map(tuple, orders(5, 6000).tolist()))
    assert len(counts) == 120
    assert abs(chi_square(np.array(list(counts.values())), 6000 / 120)) < 4


@pytest.mark.parametrize(("samples", "keys"), [(10, 3000), (37, 1000), (100, 500), (5000, 60), (40_000, 8)])
def test_the_order_looks_random(samples: int, keys: int) -> None:
    drawn = orders(samples, keys)
    bins = 10 if samples > 37 else samples
    counts = np.zeros((bins, bins), np.int64)
    np.add.at(counts, (np.arange(samples) * bins // samples, drawn * bins // samples), 1)
    # Rows and columns of the counts are fixed, which leaves (bins - 1)² degrees of freedom.
    expected, freedom = keys * samples / bins**2, (bins - 1) ** 2
    statistic = ((counts - expected) ** 2 / expected).sum() * (samples - 1) / samples
    assert abs(statistic - freedom) / (2 * freedom) ** 0.5 < 4, "positions and samples are independent"

    centered = (drawn - (samples - 1) / 2) / np.sqrt((samples**2 - 1) / 12)
    for lag in (1, 2, 8):
        correlation = (centered[:, lag:] * centered[:, :-lag]).mean() + 1 / (samples - 1)
        assert abs(correlation) * np.sqrt(keys * (samples - lag)) < 4, f"samples {lag} apart are independent"
    between = (centered[1:] * centered[:-1]).sum(1) / np.sqrt(samples - 1) * (samples - 1) / samples
    assert abs(between.mean()) * np.sqrt(keys - 1) < 4, "an epoch does not depend on the one before"


def test_epochs_seeds_and_sizes_have_unrelated_orders() -> None:
    first, *others = (
        whole(samples, key) for samples, key in [(5000, 1), (5000, 2), (5001, 1), (5000, 1 << 32), (5000, 1 << 63)]
    )
    for other in others:
        assert (first == other[:5000]).sum() < 10  # 1 on average


def global_batches(samples: int, size: int = 1, rank: int = 0, batch_size: int = 256, epoch: int = 7) -> GlobalBatchSampler:
    source = BatchSampler(RandomSampler(range(samples)), batch_size, drop_last=True)
    return GlobalBatchSampler(source, World(rank, size, rank, size), 5, is_training=True, epoch=lambda: epoch)


@pytest.mark.parametrize("samples", [1_000_000, 1_000_000_000])
def test_a_rank_computes_its_own_positions_only_wherever_it_resumes(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    computed: list[int] = []
    at = ShuffledOrder.at

    def counting(self: ShuffledOrder, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        computed.extend(positions.tolist())
        return at(self, positions)

    monkeypatch.setattr(ShuffledOrder, "at", counting)
    batches = global_batches(samples, size=64, rank=3)
    used = samples // 512 * 256
    with batches.starting_at(DataPosition(7, used=used)):
        resumed = iter(batches)
    batch = next(resumed)
    key = derive_seed(5, 7)
    own = at(ShuffledOrder(samples, key), used + np.arange(12, 16)).tolist()
    assert batch == list(zip([key] * 4, range(used + 12, used + 16), own, strict=True))
    next(resumed)
    assert len(computed) <= order._BLOCK
    assert all((position - used) % 256 // 4 == 3 for position in computed)


def test_a_sequential_loader_resumes_without_counting_up_to_its_position() -> None:
    source = BatchSampler(SequentialSampler(range(10**12)), 8, drop_last=True)
    batches = GlobalBatchSampler(source, World(), 5, is_training=True)
    with batches.starting_at(DataPosition(0, used=8 * 10**11)):
        assert [index for *_, index in next(iter(batches))] == list(range(8 * 10**11, 8 * 10**11 + 8))


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_size_that_changes_within_an_epoch_counts_at_once(size: int) -> None:
    ranks = [global_batches(20_000, size, rank, batch_size=24) for rank in range(size)]
    seen, iterators = [], [iter(batches) for batches in ranks]
    for change in (24, 48, 12, 24):
        for batches in ranks:
            batches.source.batch_size = change
        for _ in range(3):
            seen += [key for iterator in iterators for key in next(iterator)]
    key = derive_seed(5, 7)
    assert seen == list(zip([key] * len(seen), range(len(seen)), whole(20_000, key).tolist(), strict=False))
    assert len(seen) == 3 * (24 + 48 + 12 + 24)
