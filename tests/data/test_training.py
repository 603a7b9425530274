"""One train loader or several, resumed anywhere in an epoch: all modes and positions first, then runs of real ranks."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from support.faults import fault
from support.runs import SMALL, Launch, resume_run
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from lockstep.core import UsageError, World
from lockstep.data.loading.sampling import DataPosition
from lockstep.data.loading.sharding import DataSharding
from lockstep.data.loading.training import TrainingBatch, TrainingLoader


class Noisy(Dataset[tuple[int, float]]):
    """Each sample is its index and a random number."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand(()).item()


class Stream(IterableDataset[float]):
    """Random numbers, without a length."""

    def __iter__(self) -> Iterator[float]:
        return iter(torch.rand(18).tolist())


class OwnBatches(Sampler[list[int]]):
    """Batches of 5 that torch's generator draws, one at a time."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(6):
            yield torch.randint(30, (5,)).tolist()

    def __len__(self) -> int:
        return 6


class Endless(Sampler[int]):
    """Numbers that torch's generator draws, without a length."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(22):
            yield int(torch.randint(30, ()))


class OwnOrder(Sampler[Any]):
    """An order, or batches of 5, that a generator of its own draws; its state depends on the passes before."""

    def __init__(self, generator: Any, in_batches: bool) -> None:
        self.generator_of_mine, self.in_batches = generator, in_batches

    def __iter__(self) -> Iterator[Any]:
        generator = self.generator_of_mine
        if isinstance(generator, torch.Generator):
            order = torch.randperm(30, generator=generator).tolist()
        elif isinstance(generator, random.Random):
            order = generator.sample(range(30), 30)
        else:
            order = generator.permutation(30).tolist()
        yield from (order[start : start + 5] for start in range(0, 30, 5)) if self.in_batches else order


def own_loader(generator: Any, in_batches: bool) -> DataLoader[Any]:
    order = OwnOrder(generator, in_batches)
    return DataLoader(Noisy(30), batch_sampler=order) if in_batches else DataLoader(Noisy(30), batch_size=5, sampler=order)


class Drawing(IterableDataset[Any]):
    """A stream that draws from a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)

    def __iter__(self) -> Iterator[float]:
        for _ in range(22):
            yield self.rng.random()


class Drawn(Dataset[Any]):
    """Numbers with noise from a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> float:
        return float(index + self.rng.random())


def plain(samples: int, batch_size: int = 4, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(samples), batch_size=batch_size, shuffle=True, **arguments)


def load(loaders: Any, start: Any = (), epoch: int = 3, world: World | None = None) -> TrainingLoader:
    """The training data of one epoch."""
    sharding = DataSharding(world or World(), seed=3)
    combined = TrainingLoader(loaders, sharding, lambda: epoch, start)
    combined.flattened = [
        sharding.shard(loader, "Mine", is_training=True, epoch=lambda: epoch) for loader in combined.flattened
    ]
    return combined


def epoch_of(loader: TrainingLoader) -> list[tuple[Any, TrainingBatch]]:
    """All batches of an epoch, with what is known about them."""
    return [(batch, loader.newest(0)) for batch, *_ in loader]


def shapes() -> dict[str, Any]:
    """Forms in which people return train loaders."""
    return {
        "one": plain(30),
        "workers": plain(30, num_workers=1, persistent_workers=True),
        "dict": {"long": plain(30), "short": plain(10)},
        "nested": [plain(10), {"a": plain(18), "b": (plain(30, 6), plain(7))}],
        "min_size": CombinedLoader([plain(30), plain(10)], "min_size"),
        "max_size": CombinedLoader({"a": plain(30), "b": plain(10)}, "max_size"),
        "cycle": CombinedLoader([plain(10), plain(18)], "max_size_cycle"),
        "own batches": {"own": DataLoader(Noisy(30), batch_sampler=OwnBatches()), "plain": plain(10)},
        "stream": [DataLoader(Stream(), batch_size=4), plain(10)],
        "endless": DataLoader(Noisy(30), batch_size=4, sampler=Endless()),
        **{
            f"own {kind}{' in batches' * in_batches}": own_loader(generator, in_batches)
            for kind, generator in (
                ("torch.Generator", torch.Generator()),
                ("numpy Generator", np.random.default_rng(0)),
                ("RandomState", np.random.RandomState(0)),
                ("Random", random.Random(0)),
            )
            for in_batches in (False, True)
        },
        "own generator of a stream": DataLoader(Drawing(), batch_size=4),
        "own generator of a stream, with workers": DataLoader(Drawing(), batch_size=4, num_workers=1),
        "own generator of the loader": DataLoader(Stream(), batch_size=4, num_workers=1, generator=torch.Generator()),
        "own generator of a dataset": DataLoader(Drawn(), batch_size=4, shuffle=True),
    }


@pytest.mark.parametrize("form", shapes())
def test_every_loader_resumes_at_its_own_position(form: str) -> None:
    loaders = shapes()[form]
    epoch_of(load(loaders, epoch=2))  # which changes nothing either
    whole = epoch_of(load(loaders))
    torch.manual_seed(7)  # what the process draws meanwhile changes nothing
    for done in range(0, len(whole), 2 if form == "workers" else 1):
        start = whole[done - 1][1].positions if done else [DataPosition(3)] * len(whole[0][1].positions)
        resumed = epoch_of(load(shapes()[form], start))
        assert str(resumed[: len(whole) - done]) == str(whole[done:])
    # Another epoch starts at its first batch.
    assert str(epoch_of(load(shapes()[form], start, epoch=4))) == str(epoch_of(load(shapes()[form], epoch=4)))
    assert str(epoch_of(load(shapes()[form], epoch=4))) != str(whole)


class Preset(CombinedLoader):
    """Fixes the mode."""

    def __init__(self, loaders: Any) -> None:
        super().__init__(loaders, "min_size")


class Alternates(Preset):
    """Iterates in its own way."""

    def __next__(self) -> Any:
        return super().__next__()[0]


def test_a_combination_that_iterates_in_its_own_way_is_refused() -> None:
    loaders = [plain(30), plain(10)]
    assert len(epoch_of(load(Preset(loaders)))) == len(epoch_of(load(CombinedLoader(loaders, "min_size"))))
    with pytest.raises(UsageError, match=r"^data: train_dataloader returns a Alternates, which defines __next__; .* Return a "):
        load(Alternates(loaders))


def test_each_cycle_of_a_shorter_loader_has_its_own_order_and_augmentation() -> None:
    batches = epoch_of(load({"long": plain(48), "short": plain(8)}))
    short = [batch["short"] for batch, _ in batches]
    cycles = [
        [*zip(*(torch.cat(column).tolist() for column in zip(*short[at : at + 2], strict=True)), strict=True)]
        for at in (0, 2, 4)
    ]
    assert all({index for index, _ in cycle} == set(range(8)) for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) == 3 == len({tuple(sorted(cycle)) for cycle in cycles})


@pytest.mark.parametrize("ranks", [(2, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("done", [1, 3, 5])
def test_with_a_batch_per_rank_another_number_of_ranks_uses_each_sample_once(ranks: tuple[int, int], done: int) -> None:
    before, after = ([World(rank, size, rank, size) for rank in range(size)] for size in ranks)
    used = [epoch_of(load(plain(96, 6 * world.size), world=world))[:done] for world in before]
    start = used[0][-1][1].positions
    loaders = [load(plain(96, 6 * world.size), start, world=world) for world in after]
    rest = [epoch_of(loader) for loader in loaders]
    seen = [int(index) for rank in used + rest for (indices, _), _ in rank for index in indices]
    assert sorted(seen) == list(range(96))
    batches = max(0, -(-(96 - 6 * ranks[0] * done) // (6 * ranks[1])))
    assert [len(rank) for rank in rest] == [batches] * ranks[1]
    assert loaders[0].batches_done() == 96 // (6 * ranks[1]) - batches


def test_weights_over_several_loaders() -> None:
    """Loaders of the same size share one weight; otherwise a last batch that the ranks cannot share evenly is refused."""
    worlds = [World(rank, 2, rank, 2) for rank in range(2)]
    weights = [[batch.weight for _, batch in epoch_of(load([plain(11), plain(11)], world=world))] for world in worlds]
    assert weights == [[1, 1, pytest.approx(4 / 3)], [1, 1, pytest.approx(2 / 3)]]
    with pytest.raises(
        UsageError, match="the last batch of train loader 2 of 2 has 3 samples, which 2 ranks cannot share evenly"
    ):
        epoch_of(load({"a": plain(12), "b": plain(7)}, world=worlds[0]))
    assert len(epoch_of(load({"a": plain(12), "b": plain(7, drop_last=True)}, world=worlds[0]))) == 3
    assert len(epoch_of(load({"a": plain(12), "b": plain(7)}))) == 3


class Counted(Sampler[int]):
    """Some numbers, without a length."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.samples))


def test_a_smaller_last_batch_of_a_sampler_without_length_weighs_as_any_other() -> None:
    worlds = [World(rank, 2, rank, 2) for rank in range(2)]

    def counted(samples: int) -> DataLoader[Any]:
        return DataLoader(Noisy(30), batch_size=4, sampler=Counted(samples))

    for world in worlds:
        sized, unsized = (
            [(batch.weight, batch.samples, batch.positions) for _, batch in epoch_of(load(loader, world=world))]
            for loader in (DataLoader(Noisy(11), batch_size=4), counted(11))
        )
        assert sized == unsized
    with pytest.raises(UsageError, match="batches of 4, 3 samples in one step, which 2 ranks cannot share with one weight"):
        epoch_of(load([counted(12), counted(7)], world=worlds[0]))
    assert len(epoch_of(load([counted(11), counted(7)]))) == 3


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(UsageError, match="a CombinedLoader with mode 'sequential', which Lightning does not train with"):
        load(CombinedLoader([plain(8)], "sequential"))
    with pytest.raises(UsageError, match="returns 2 loaders, but the checkpoint was saved with 1"):
        load([plain(8), plain(8)], [DataPosition(3)])


@pytest.mark.parametrize("shuffle", [True, False])
def test_one_rule_for_the_global_batch_of_every_training_loader(shuffle: bool) -> None:
    world = World(0, 2, 0, 2)
    with pytest.raises(UsageError, match="batch_size=5 is the global batch size and is not divisible by 2 ranks; use 4 or 6"):
        load(DataLoader(Noisy(48), batch_size=5, shuffle=shuffle), world=world)
    with pytest.raises(UsageError, match="batch_size=1 is the global batch size and is not divisible by 2 ranks; use 2"):
        load(DataLoader(Noisy(48), batch_size=1, shuffle=shuffle), world=world)
    with pytest.raises(UsageError, match="the last batch of an epoch has 1 of 49 samples, fewer than the 2 ranks"):
        load(DataLoader(Noisy(49), batch_size=4, shuffle=shuffle), world=world)
    sampler = RandomSampler(Noisy(48)) if shuffle else None
    with pytest.raises(UsageError, match="use 4 or 6"):
        load(DataLoader(Noisy(48), batch_sampler=BatchSampler(sampler or range(48), 5, False)), world=world)


def test_a_run_with_a_batch_per_rank_goes_on_with_half_of_its_ranks(launch: Launch, tmp_path: Path) -> None:
    per_rank = (*SMALL, "--data.batch_size", "null", "--data.batch_size_per_rank", "16", "--checkpoint.every_n_steps", "5")
    once = fault(tmp_path / "once", "SIGKILL", step=12)
    run = launch("--ranks", "2", *per_rank, "--checkpoint.async_save", "false", *once)
    assert run.newest.step == 10
    resumed = resume_run(launch, run, "--ranks", "1")
    assert resumed.status == 0
    assert resumed.result["global_step"] == 10 + (1280 - 10 * 32) // 16 + 1280 // 16


class FastClock(Callback):
    """Sets the clock of rank one forward when training has begun."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 1:
            own_clock = time.monotonic
            time.monotonic = lambda: own_clock() + 0.5


def test_one_clock_decides_for_all_ranks_when_to_validate(launch: Launch, tmp_path: Path) -> None:
    """Also after a kill in a validation, which is then repeated at once."""
    timed = (
        *("--ranks", "2", "--model", "support.toy_model.TiedAndFrozen", "--data", "support.toy_model.ToyData"),
        *("--data.workers", "0", "--trainer.max_epochs", "6", "--trainer.log_every_n_steps", "5"),
        *("--trainer.val_check_interval", "00:00:00:01", "--run.hang_timeout_seconds", "20"),
        *("--trainer.callbacks+=support.fault_callbacks.StepRecorder", "--trainer.callbacks.seconds=0.05"),
        *(f"--trainer.callbacks.diary={tmp_path}/diary", f"--trainer.callbacks+={__name__}.FastClock"),
        *("--checkpoint.async_save", "false"),
    )
    run = launch(*timed, *fault(tmp_path / "once", "SIGKILL", hook="on_validation_start", rank=1))
    assert run.status == 1
    step = run.newest.step
    assert 0 < step < 120
    resumed = resume_run(launch, run)
    assert (resumed.status, resumed.result["global_step"]) == (0, 120)
    lines = (run.folder / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    validated = [int(row["step"]) for row in rows if row["val/loss"]]
    assert validated[0] == step and len(validated) >= 2
