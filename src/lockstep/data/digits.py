"""UCI optical digits: 1,797 grey images of 8×8, embedded in the package, so that a run needs no network.

Source: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998,
test part, licensed CC BY 4.0; ``digits.csv.gz`` holds one image a line: 64 values of 0 to 16, then the label.
"""

import gzip
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2

from lockstep.data.base import ImageData, InMemoryImages, Part, split_indices

_TEST_SAMPLES, _TEST_SEED = 360, 1998


class Digits(ImageData):
    """Digits 0 to 9 as images (1, 8, 8): 1,280 for training, 157 for validation, 360 for testing.

    The test set is drawn once and for all, whatever the seed; the others are split by it.

    Args:
        augment: Shift each training image by up to a pixel.
        batch_size: See ImageData.
        batch_size_per_rank: See ImageData.
        num_workers: See ImageData.
        drop_last: See ImageData.
        seed: See ImageData.
    """

    num_classes = 10
    image_shape = (1, 8, 8)
    mean = (0.287,)
    std = (0.354,)

    def __init__(
        self,
        augment: bool = False,
        batch_size: int | None = None,
        batch_size_per_rank: int | None = None,
        num_workers: int | None = None,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(Path(), batch_size, batch_size_per_rank, num_workers, drop_last, seed)
        self.augment = augment

    def load(self, part: Part) -> InMemoryImages:
        """One part of the embedded file."""
        with files("lockstep.data").joinpath("digits.csv.gz").open("rb") as packed, gzip.open(packed) as lines:
            table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
        images, labels = table[:, :64].reshape(-1, 1, 8, 8) * 15, table[:, 64].long()
        if part == "test":
            chosen = split_indices(len(table), _TEST_SAMPLES, _TEST_SEED, "val")
            return InMemoryImages(images[chosen], labels[chosen])
        known = split_indices(len(table), _TEST_SAMPLES, _TEST_SEED, "train")
        chosen = known[split_indices(len(known), 157, self.seed, part)]
        transform = v2.RandomCrop(8, padding=1) if part == "train" and self.augment else None
        return InMemoryImages(images[chosen], labels[chosen], transform)
