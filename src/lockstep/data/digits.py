"""UCI optical digits: 1,797 grey images of 8×8, part of the package, so that a run needs no network.

Source: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998,
test part, licensed CC BY 4.0. Each line of ``digits.csv.gz`` is an image: 64 values of 0 to 16, then the label.
"""

import gzip
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

from lockstep.data.base import ImageData, InMemoryImages, Split, split_indices


class Digits(ImageData):
    """Digits 0 to 9 as images (1, 8, 8): 1,280 for training, 157 for validation, 360 for testing.

    The test set is the same for every seed; the seed splits the rest.

    Args:
        augment: Shift each training image at random, by one pixel at most.
        **options: Arguments of ImageData.
    """

    num_classes = 10
    image_shape = (1, 8, 8)
    mean = (0.287,)
    std = (0.354,)

    def __init__(self, augment: bool = False, **options: Any) -> None:
        super().__init__(Path(), **options)
        self.augment = augment

    def load(self, split: Split) -> InMemoryImages:
        """One split of the embedded file."""
        with files("lockstep.data").joinpath("digits.csv.gz").open("rb") as packed, gzip.open(packed) as lines:
            table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
        images, labels = table[:, :64].reshape(-1, 1, 8, 8) * 15, table[:, 64].long()
        chosen = split_indices(len(table), 360, seed=1998, split="val" if split == "test" else "train")
        if split != "test":
            chosen = chosen[split_indices(len(chosen), 157, self.seed, split)]
        transform = v2.RandomCrop(8, padding=1) if split == "train" and self.augment else None
        return InMemoryImages(images[chosen], labels[chosen], transform)
