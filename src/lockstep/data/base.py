"""What every DataModule here shares: batch sizes, loaders, splits, normalization on the device."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from lockstep.core import UsageError
from lockstep.data.seeding import derive_seed

log = logging.getLogger(__name__)


Part = Literal["train", "val", "test"]


_PARTS_BY_STAGE: dict[str, tuple[Part, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


class ImageData(LightningDataModule):
    """Images and labels for the shared classifier. A subclass gives ``num_classes``, ``image_shape`` (C, H, W), ``mean``,
    ``std`` and ``load``.

    Loaders give uint8 images (B, C, H, W), a quarter of the bytes of float32; they become normalized floats on the device.

    Args:
        root: Folder that holds the data.
        batch_size: Global batch: samples of one step over all ranks, 64 by default. A run means the same on any number
            of ranks.
        batch_size_per_rank: The other choice: samples of one step on each rank. Learning rate and warm-up are scaled
            with the number of ranks (Goyal et al. 2017), and the log says so.
        num_workers: Processes that prepare samples, for each rank; by default none for a single local process (so that a
            debugger works) or for data held in memory, else one per CPU that this rank has, less one.
        drop_last: Leave out the last, smaller batch of a training epoch.
        seed: Decides the split; the run's seed by default.

    Raises:
        UsageError: A number is out of range, or both batch sizes are set.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    in_memory = True

    def __init__(
        self,
        root: Path = Path("data"),
        batch_size: int | None = None,
        batch_size_per_rank: int | None = None,
        num_workers: int | None = None,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size_per_rank is not None:
            raise UsageError(
                f"data.batch_size: {batch_size} and data.batch_size_per_rank: {batch_size_per_rank} are both set; "
                "set one of them to null."
            )
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("batch_size_per_rank", batch_size_per_rank, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"data.{key}: {value} must be {least} or more.")
        self.root = Path(root)
        self.batch_size, self.batch_size_per_rank = batch_size, batch_size_per_rank
        self.num_workers, self.drop_last, self.seed = num_workers, drop_last, seed
        self._parts: dict[Part, Dataset[Any]] = {}
        self._constants: tuple[Tensor, Tensor] | None = None

    def load(self, part: Part) -> Dataset[Any]:
        """The dataset of one part, read from ``root``."""
        raise NotImplementedError(f"{type(self).__name__} must define load(part)")

    @property
    def _ranks(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def global_batch(self) -> int:
        """Samples of one step over all ranks."""
        if self.batch_size_per_rank is not None:
            return self.batch_size_per_rank * self._ranks
        return self.batch_size or 64

    @property
    def lr_scale(self) -> int:
        """What the learning rate is multiplied by: the number of ranks where the batch size is per rank, else 1."""
        return self._ranks if self.batch_size_per_rank is not None else 1

    def setup(self, stage: str) -> None:
        """Load the parts that ``stage`` needs, on every rank, and nothing else."""
        for part in _PARTS_BY_STAGE[stage]:
            if part not in self._parts:
                self._parts[part] = self.load(part)
        if stage == "fit" and self.batch_size_per_rank is not None:
            log.info(
                "%d samples on each of %d ranks: global batch %d", self.batch_size_per_rank, self._ranks, self.global_batch
            )

    def _loader(self, part: Part) -> DataLoader[Any]:
        workers = self._workers()
        return DataLoader(
            self._parts[part],
            batch_size=self.global_batch,
            shuffle=part == "train",
            drop_last=part == "train" and self.drop_last,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            collate_fn=self.collate,
        )

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if self.in_memory or self._ranks == 1:
            return 0
        local_ranks = self._ranks // self.trainer.num_nodes if self.trainer is not None else 1
        everyone, mine = os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        # A rank that is bound to CPUs of its own sees those alone; else all ranks of the node see, and share, the same.
        cpus = mine if mine is not None and mine < everyone else everyone // local_ranks
        return max(1, cpus - 1)

    def collate(self, samples: Any) -> Any:
        """A batch of ``samples``; a dataset that fetches whole batches has made it already."""
        return default_collate(samples) if isinstance(samples, list) else samples

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled; ``batch_size`` is the global batch, which the strategy shares out."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """In order; each sample once."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """In order; each sample once."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test set, in order; each sample once."""
        return self._loader("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """uint8 images become float32, less ``mean`` and divided by ``std`` (both per channel, of a range of 0 to 1)."""
        images, labels = batch
        if images.dtype != torch.uint8:
            return batch
        if self._constants is None or self._constants[0].device != images.device:
            shape = (1, -1, 1, 1)
            mean = torch.tensor(self.mean, device=images.device).view(shape)
            std = torch.tensor(self.std, device=images.device).view(shape)
            self._constants = mean * 255, 1 / (std * 255)
        mean, factor = self._constants
        return images.to(torch.float32).sub_(mean).mul_(factor), labels


class InMemoryImages(Dataset[Any]):
    """Images held in memory.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        transform: Applied to each image (C, H, W); it may be random.
    """

    def __init__(self, images: Tensor, labels: Tensor, transform: v2.Transform | None = None) -> None:
        self.images, self.labels, self.transform = images, labels, transform
        self.deterministic = transform is None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def __getitems__(self, indices: list[int]) -> Any:
        """A whole batch at once, where there is no transform; else a list of samples."""
        if self.transform is not None:
            return [self[index] for index in indices]
        chosen = torch.tensor(indices)
        return self.images[chosen], self.labels[chosen]


def split_indices(samples: int, val_samples: int, seed: int, part: Part) -> Tensor:
    """The indices of ``train`` or ``val`` in a set of ``samples``, drawn from ``seed`` and so the same on every rank.

    Returns:
        int64 (samples - val_samples,) for train, (val_samples,) for val.

    Raises:
        UsageError: ``val_samples`` leaves nothing to train on.
    """
    if not 0 < val_samples < samples:
        raise UsageError(f"data.val_samples: {val_samples} must be between 1 and {samples - 1}, for {samples} samples.")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(seed) >> 1))
    return order[val_samples:] if part == "train" else order[:val_samples]
