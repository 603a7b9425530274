"""Random images of any shape: for measuring everything but the input."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lockstep.core import UsageError
from lockstep.data.base import ImageData, Part
from lockstep.data.seeding import derive_seed

_POOL = 256


class SyntheticImages(Dataset[tuple[Tensor, Tensor]]):
    """As many images as one likes, out of a pool of 256 different ones that is held in memory.

    Args:
        samples: Length of the data set.
        shape: Shape of an image, (C, H, W).
        num_classes: Labels are 0 to ``num_classes - 1``.
        seed: Draws the pool.
    """

    deterministic = True

    def __init__(self, samples: int, shape: Sequence[int], num_classes: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = min(samples, _POOL)
        self.samples = samples
        self.images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, num_classes, (size,), generator=generator)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index % len(self.images)], self.labels[index % len(self.images)]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once."""
        chosen = torch.tensor(indices) % len(self.images)
        return self.images[chosen], self.labels[chosen]


class Synthetic(ImageData):
    """Random images and labels; nothing can be learnt from them but by heart.

    Args:
        shape: Shape of an image, (C, H, W).
        classes: Number of classes.
        train_samples: Samples of an epoch.
        val_samples: Samples of the validation set.
        test_samples: Samples of the test set.
        batch_size: See ImageData.
        batch_size_per_rank: See ImageData.
        num_workers: See ImageData.
        drop_last: See ImageData.
        seed: See ImageData.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 224, 224),
        classes: int = 1_000,
        train_samples: int = 12_800,
        val_samples: int = 1_024,
        test_samples: int = 1_024,
        batch_size: int | None = None,
        batch_size_per_rank: int | None = None,
        num_workers: int | None = None,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            batch_size_per_rank=batch_size_per_rank,
            num_workers=num_workers,
            drop_last=drop_last,
            seed=seed,
        )
        samples = {"train": train_samples, "val": val_samples, "test": test_samples}
        for key, value in [*samples.items(), ("classes", classes), *((f"shape[{i}]", n) for i, n in enumerate(shape))]:
            if value < 1:
                raise UsageError(f"data.{key + '_samples' if key in samples else key}: {value} must be 1 or more.")
        self.image_shape, self.num_classes, self.samples = shape, classes, samples
        self.mean, self.std = (0.5,) * shape[0], (0.29,) * shape[0]

    def load(self, part: Part) -> SyntheticImages:
        """One part, drawn from the seed."""
        number = ("train", "val", "test").index(part)
        return SyntheticImages(self.samples[part], self.image_shape, self.num_classes, derive_seed(self.seed, number) >> 1)
