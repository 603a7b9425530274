"""Random images of any shape, to measure everything except the input pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.core import UsageError
from lockstep.data.base import ImageData, InMemoryImages, Split
from lockstep.data.loading import derive_seed


class SyntheticImages(InMemoryImages):
    """Any number of samples, of shape (C, H, W), from a pool of 256 random images in memory."""

    def __init__(self, samples: int, shape: Sequence[int], num_classes: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = min(samples, 256)
        images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, generator=generator)
        super().__init__(images, torch.randint(0, num_classes, (size,), generator=generator))
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return super().__getitem__(index % len(self.images))

    def __getitems__(self, indices: list[int]) -> Any:
        """A batch: images, uint8 (B, C, H, W), and labels, int64 (B,)."""
        size = len(self.images)
        return super().__getitems__([index % size for index in indices])


class Synthetic(ImageData):
    """Random images and random labels.

    Args:
        shape: Shape of an image, (C, H, W).
        classes: Number of classes.
        train_samples: Samples of a training epoch.
        val_samples: Samples of the validation set.
        test_samples: Samples of the test set.
        **options: Arguments of ImageData.

    Raises:
        UsageError: A number is less than 1.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 224, 224),
        classes: int = 1_000,
        train_samples: int = 12_800,
        val_samples: int = 1_024,
        test_samples: int = 1_024,
        **options: Any,
    ) -> None:
        super().__init__(Path(), **options)
        samples = {"train_samples": train_samples, "val_samples": val_samples, "test_samples": test_samples}
        sizes = {f"shape[{axis}]": size for axis, size in enumerate(shape)}
        for key, value in (samples | {"classes": classes} | sizes).items():
            if value < 1:
                raise UsageError(f"data.{key}: {value} must be 1 or more.")
        self.image_shape, self.num_classes, self.samples = shape, classes, samples
        self.mean, self.std = (0.5,) * shape[0], (0.29,) * shape[0]

    def load(self, split: Split) -> SyntheticImages:
        """One split, drawn from the seed."""
        seed = derive_seed(self.seed, ("train", "val", "test").index(split)) >> 1
        return SyntheticImages(self.samples[f"{split}_samples"], self.image_shape, self.num_classes, seed)
