"""DataLoaders and datasets."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from support.runs import Outcome
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from foreign.base import BATCH_SIZE, SAMPLES, Points, Regression, Row, points
from foreign.samplers import OWN_ORDER


def loader(seed: int = 0, samples: int = SAMPLES, **options: Any) -> DataLoader[Any]:
    return DataLoader(points(seed, samples), **{"batch_size": BATCH_SIZE, **options})


class Several(Regression):
    """Learns from the batches of several loaders, as a dict or a list; one that has ended is None."""

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            batch = list(batch.values())
        if torch.is_tensor(batch[0]):
            return super().loss(batch)
        return torch.stack([super(Several, self).loss(each) for each in batch if each is not None]).mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val/loss", self.loss(batch), sync_dist=True)


class GeneratorLoader(DataLoader[Any]):
    def __iter__(self) -> Any:
        yield from super().__iter__()


class OwnIteration(Points):
    def train_dataloader(self) -> Any:
        return GeneratorLoader(points(), batch_size=BATCH_SIZE)


class DictOfLoaders(Points):
    def train_dataloader(self) -> Any:
        return {"a": loader(), "b": loader(2, 24)}


class ListOfLoaders(Points):
    def train_dataloader(self) -> Any:
        return [loader(), loader(2)]


class Combined(Points):
    """Loaders of 6 and 3 batches."""

    def __init__(self, mode: Any = "min_size") -> None:
        super().__init__()
        self.mode = mode

    def train_dataloader(self) -> Any:
        return CombinedLoader({"a": loader(), "b": loader(2, 24)}, self.mode)


class CombinedShuffled(Combined):
    def train_dataloader(self) -> Any:
        return CombinedLoader({"a": loader(shuffle=True), "b": loader(2, 24, shuffle=True)}, self.mode)


class SeveralForValidation(Points):
    def val_dataloader(self) -> Any:
        return [loader(1), loader(3, 20)]


class Stream(IterableDataset[Any]):
    """Numbered points, each rank its part."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[Any]:
        all_points = points()
        for index in range(self.rank, SAMPLES, self.ranks):
            yield all_points[index]


class Streamed(Points):
    def train_dataloader(self) -> Any:
        trainer = self.trainer
        stream = Stream(trainer.global_rank, trainer.world_size)
        return DataLoader(stream, batch_size=BATCH_SIZE // trainer.world_size, num_workers=self.workers)


class StatefulStream(Stream):
    """Noisy points whose place is in a ``state_dict``; each worker of a rank has a part of its part."""

    place = start = 0

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        own = range(self.rank + self.ranks * worker, SAMPLES, self.ranks * workers)
        start, self.start = self.start, 0
        for self.place in range(start + 1, len(own) + 1):
            x, y = points()[own[self.place - 1]]
            yield x + 0.1 * torch.rand(4), y

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["place"]


class StatefullyStreamed(Streamed):
    def train_dataloader(self) -> Any:
        trainer = self.trainer
        stream = StatefulStream(trainer.global_rank, trainer.world_size)
        return DataLoader(stream, batch_size=BATCH_SIZE // trainer.world_size, num_workers=self.workers)


class UnevenlyStreamed(Points):
    """The last rank has a batch less than the others, to train and to validate."""

    def train_dataloader(self) -> Any:
        return self.stream()

    def stream(self) -> Any:
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        batches = list(DataLoader(Stream(rank, ranks), batch_size=BATCH_SIZE // ranks))
        return DataLoader(Replayed(batches[: 5 if 0 < rank == ranks - 1 else 6]), batch_size=None)

    val_dataloader = stream


class Replayed(IterableDataset[Any]):
    """Some batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class StatefulLoader:
    """A loader with its place in a ``state_dict``, as torchdata's."""

    def __init__(self) -> None:
        self.batch, self.start, self.loader = 0, 0, loader()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for number, batch in enumerate(self.loader):
            if number >= start:
                self.batch = number + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["batch"]


class Stateful(Points):
    def train_dataloader(self) -> Any:
        return StatefulLoader()


class PersistentWorkers(Points):
    def train_dataloader(self) -> Any:
        return loader(shuffle=True, num_workers=2, persistent_workers=True)


class Reloaded(Points):
    """Other data after each reload."""

    def train_dataloader(self) -> Any:
        return loader(self.trainer.current_epoch, shuffle=True)


class DropsLast(Points):
    def train_dataloader(self) -> Any:
        return loader(samples=52, shuffle=True, drop_last=True)


class Uneven(Points):
    """A last batch of five."""

    def train_dataloader(self) -> Any:
        return loader(samples=45)

    def val_dataloader(self) -> Any:
        return loader(1, 29)


class Indivisible(Points):
    def train_dataloader(self) -> Any:
        return loader(batch_size=5)


class BatchOfOne(Points):
    def train_dataloader(self) -> Any:
        return loader(batch_size=1)


class OwnCollate(Points):
    def train_dataloader(self) -> Any:
        return loader(collate_fn=self.collate)

    def collate(self, samples: Any) -> Any:
        x, y = default_collate(samples)
        return {"x": x.flip(1), "y": y}


class LearnsFromDicts(Regression):
    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch["x"], batch["y"]) if isinstance(batch, dict) else batch)


class OwnLoaders(Regression):
    """A module with its own loaders."""

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(1)


class Batched(Dataset[Any]):
    """A dataset that gives batches."""

    def __len__(self) -> int:
        return SAMPLES // BATCH_SIZE

    def __getitem__(self, index: int) -> Any:
        return default_collate([points()[index * BATCH_SIZE + number] for number in range(BATCH_SIZE)])


class AlreadyBatched(Points):
    def train_dataloader(self) -> Any:
        return DataLoader(Batched(), batch_size=None)


class ByLists(Dataset[Any]):
    """A dataset that is read by lists of indices alone."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [points()[index] for index in indices]


class ReadByLists(Points):
    def dataset(self) -> Dataset[Any]:
        return ByLists()


def steps(number: int) -> Any:
    """A check that the run took ``number`` steps."""

    def check(run: Outcome) -> None:
        assert run.result["global_step"] == number

    return check


ROWS = (
    Row(
        "a dict of loaders, one shorter",
        model=Several,
        data=DictOfLoaders,
        check=steps(12),
    ),
    Row("a list of loaders", model=Several, data=ListOfLoaders, check=steps(12)),
    Row("`CombinedLoader`, `min_size`", "--data.mode min_size", Several, Combined, kill_step=5, check=steps(6)),
    Row("`CombinedLoader`, `max_size`", "--data.mode max_size", Several, Combined, check=steps(12)),
    Row(
        "`CombinedLoader`, `max_size_cycle`",
        "--data.mode max_size_cycle",
        Several,
        Combined,
        kill_step=11,
        check=steps(12),
    ),
    Row(
        "`CombinedLoader`, `max_size_cycle`, shuffled",
        "--data.mode max_size_cycle",
        Several,
        CombinedShuffled,
        kill_step=11,
        own_order=OWN_ORDER,
    ),
    Row("a DataLoader whose `__iter__` is a generator", data=OwnIteration),
    Row("several loaders for validation", model=Several, data=SeveralForValidation),
    Row("an `IterableDataset` that shards itself", data=Streamed, per_rank="the dataset shards itself"),
    Row(
        "an `IterableDataset` with a `state_dict`, with workers",
        "--data.workers 2",
        data=StatefullyStreamed,
        own_order="random numbers of a stream depend on seed, epoch, rank and batch",
        per_rank="the dataset shards itself",
        check=steps(12),
    ),
    Row(
        "an `IterableDataset` with fewer batches on one rank",
        data=UnevenlyStreamed,
        per_rank="an epoch ends on all ranks when one has no batch left",
    ),
    Row("a loader with a `state_dict`", data=Stateful, logged_per_rank="each rank takes all batches"),
    Row("workers", "--data.workers 2"),
    Row("persistent workers", data=PersistentWorkers, own_order=OWN_ORDER),
    Row(
        "`reload_dataloaders_every_n_epochs`",
        "--trainer.reload_dataloaders_every_n_epochs 2 --trainer.max_epochs 4",
        data=Reloaded,
        kill_step=15,
        own_order=OWN_ORDER,
    ),
    Row("`drop_last=True`", data=DropsLast, own_order=OWN_ORDER, check=steps(12)),
    Row(
        "a last, smaller batch",
        data=Uneven,
    ),
    Row(
        "a batch that does not divide by the ranks",
        data=Indivisible,
        refused="batch_size=5 is the global batch size and is not divisible by 2 ranks",
    ),
    Row(
        "batches of one sample, on two ranks",
        data=BatchOfOne,
        refused="batch_size=1 is the global batch size and is not divisible by 2 ranks",
    ),
    Row("a custom `collate_fn`", model=LearnsFromDicts, data=OwnCollate),
    Row("loaders on the module, no DataModule", model=OwnLoaders, data=None),
    Row("`batch_size=None`: the dataset gives batches", data=AlreadyBatched, logged_per_rank="each rank takes all batches"),
    Row("a dataset with `__getitems__` alone", data=ReadByLists),
)
