"""The base of the DataModules: batch sizes, loaders, splits, and normalization on the device."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from lockstep.config import check_mixing, check_pairs
from lockstep.core import UsageError
from lockstep.data.augment import AugmentedSamples, Blends, Mixing, check_transforms, mix
from lockstep.data.batch_memory import BatchMemory
from lockstep.data.loading import derive_seed

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]

STAGE_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}
"""The splits that each stage of the Trainer reads."""


class ImageData(LightningDataModule):
    """Images and labels for the shared classifier. A subclass defines ``num_classes``, ``image_shape`` (C, H, W), ``mean``,
    ``std`` and ``load``.

    Loaders return uint8 images (B, C, H, W), a quarter of the bytes of float32; they are normalized to float32 on the device.

    Args:
        root: Folder of the data.
        batch_size: Global batch size: samples of one step over all ranks, 64 by default. A run computes the same on any
            number of ranks.
        batch_size_per_rank: Set this instead for a fixed number of samples on each rank. Learning rate and warm-up are then
            scaled with the number of ranks (Goyal et al. 2017), and the log says so.
        num_workers: Processes of each rank that prepare samples. By default the CPUs of this rank less one; 0 for a single
            local process (so that a debugger works) and for data in memory.
        drop_last: Drop the last, smaller batch of a training epoch.
        seed: Seed of the split; the run's seed by default.
        transforms: Random transforms of a training image, such as ``torchvision.transforms.v2.RandAugment``, after its crop and
            flip. They get uint8 (C, H, W), 0 to 255. Their random numbers depend on (seed, epoch, position) alone.
        mixup: Alpha of MixUp, such as 0.2; 0 disables it. Neighbours in the shuffled batch are mixed; labels are then
            probabilities, float32 (B, num_classes). The mixed pairs do not depend on the number of ranks.
        cutmix: Alpha of CutMix, such as 1.0; 0 disables it. With both, each pair takes one of them at random.

    Raises:
        UsageError: A number is out of range, both batch sizes are set, or a transform works on batches.
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
        transforms: list[nn.Module] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size_per_rank is not None:
            raise UsageError(
                f"data.batch_size: {batch_size} and data.batch_size_per_rank: {batch_size_per_rank} are both set; "
                "set one of them to null."
            )
        self.root = Path(root)
        self.batch_size, self.batch_size_per_rank = batch_size, batch_size_per_rank
        self.num_workers, self.drop_last, self.seed = num_workers, drop_last, seed
        for key, least in (("batch_size", 1), ("batch_size_per_rank", 1), ("num_workers", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UsageError(f"data.{key}: {value} must be {least} or more.")
        mixup, cutmix = mixup or 0.0, cutmix or 0.0  # a config may say null
        check_mixing(mixup, cutmix, drop_last)
        check_transforms(transforms or [])
        self.transforms, self.mixup, self.cutmix = transforms or [], mixup, cutmix
        self._datasets: dict[Split, Dataset[Any]] = {}
        self._normalization: tuple[Tensor, Tensor] | None = None
        self._memory = BatchMemory()

    def load(self, split: Split) -> Dataset[Any]:
        """The dataset of one split, read from ``root``."""
        raise NotImplementedError(f"{type(self).__name__} must define load(split)")

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def global_batch_size(self) -> int:
        """Samples of one step over all ranks."""
        if self.batch_size_per_rank is not None:
            return self.batch_size_per_rank * self._world_size
        return self.batch_size or 64

    @property
    def lr_scale(self) -> int:
        """Factor on the learning rate: the number of ranks with ``batch_size_per_rank``, else 1."""
        return self._world_size if self.batch_size_per_rank is not None else 1

    def setup(self, stage: str) -> None:
        """Load the splits that ``stage`` needs; runs on every rank."""
        for split in STAGE_SPLITS[stage]:
            if split not in self._datasets:
                self._datasets[split] = self.load(split)
        if stage == "fit" and self.batch_size_per_rank is not None:
            batch = self.global_batch_size
            log.info("%d samples on each of %d ranks: global batch size %d", self.batch_size_per_rank, self._world_size, batch)
        if stage == "fit" and (self.mixup or self.cutmix):
            check_pairs(self.global_batch_size, self._world_size)

    def _loader(self, split: Split) -> DataLoader[Any]:
        workers, dataset = self._worker_count(), self._datasets[split]
        is_mixed = self.mixup or self.cutmix
        if split == "train" and (self.transforms or is_mixed):
            mixing = Mixing(self.mixup, self.cutmix, *self.image_shape[1:]) if is_mixed else None
            dataset = AugmentedSamples(dataset, self.transforms, mixing)
        return DataLoader(
            dataset,
            batch_size=self.global_batch_size,
            shuffle=split == "train",
            drop_last=split == "train" and self.drop_last,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            collate_fn=self.collate,
        )

    def _worker_count(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if self.in_memory or self._world_size == 1:
            return 0
        local_ranks = self._world_size // self.trainer.num_nodes if self.trainer is not None else 1
        total = os.cpu_count() or 1
        bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
        # A rank that is bound to some CPUs has them for itself; otherwise all ranks of the node share all CPUs.
        return max(1, (bound if bound < total else total // local_ranks) - 1)

    def collate(self, samples: Any) -> Any:
        """Collate a list of samples to images, labels and, if they are mixed, ``Blends``; return a batch unchanged."""
        if not isinstance(samples, list):
            return samples
        images, labels, *drawn = map(list, zip(*samples, strict=True))
        blends = [Blends.collate(drawn[0], range(len(samples)))] if drawn else []
        return [self._memory.stack(images), default_collate(labels), *blends]

    collate.deterministic = True  # type: ignore[attr-defined]  # it draws no random numbers

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled global batches, which the strategy shards."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Each sample once, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Each sample once, in order."""
        return self._loader("test")

    predict_dataloader = test_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalize uint8 images to float32, (image / 255 - mean) / std per channel, and mix pairs of a training batch."""
        images, labels, *blends = batch
        images = self._normalize(images) if images.dtype == torch.uint8 else images
        return mix(images, labels, blends[0], self._outputs) if blends else (images, labels)

    @property
    def _outputs(self) -> int:
        """Outputs of the model: the classes of the data, unless the model says that it has more."""
        outputs = getattr(self.trainer.lightning_module, "num_classes", None) if self.trainer is not None else None
        return max(self.num_classes, outputs) if isinstance(outputs, int) else self.num_classes

    def _normalize(self, images: Tensor) -> Tensor:
        if self._normalization is None or self._normalization[0].device != images.device:
            mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) * 255 for v in (self.mean, self.std))
            self._normalization = mean, 1 / std
        mean, factor = self._normalization
        return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).mul_(factor)


class InMemoryImages(Dataset[Any]):
    """Images, uint8 (N, C, H, W), and labels, int64 (N,), in memory; ``transform`` of an image (C, H, W) may be random."""

    def __init__(self, images: Tensor, labels: Tensor, transform: v2.Transform | None = None) -> None:
        self.images, self.labels, self.transform = images, labels, transform
        self.deterministic = transform is None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def __getitems__(self, indices: list[int]) -> Any:
        """A batch of images and labels without a transform; else a list of samples."""
        if self.transform is not None:
            return [self[index] for index in indices]
        chosen = torch.tensor(indices)
        return self.images[chosen], self.labels[chosen]


def split_indices(samples: int, val_samples: int, seed: int, split: Split) -> Tensor:
    """The indices of ``train`` or ``val`` among ``samples``, int64 (n,), drawn from ``seed`` and so equal on every rank.

    Raises:
        UsageError: ``val_samples`` leaves no sample for training.
    """
    if not 0 < val_samples < samples:
        raise UsageError(f"data.val_samples: {val_samples} must be between 1 and {samples - 1}, for {samples} samples.")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(seed) >> 1))
    return order[val_samples:] if split == "train" else order[:val_samples]
