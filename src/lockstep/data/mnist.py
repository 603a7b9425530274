"""MNIST: 70,000 grey images of 28×28. torchvision downloads, verifies and reads the idx files."""

from typing import Any

import torchvision
from torch import Tensor
from torchvision.transforms import v2

from lockstep.data.downloaded import DownloadedData


class MNIST(DownloadedData):
    """Handwritten digits as images (1, 28, 28): 55,000 for training, 5,000 for validation, 10,000 for testing.

    ``<root>/mnist/MNIST/raw`` holds the four idx files. ``augment`` shifts an image at random, by two pixels
    at most.
    """

    num_classes = 10
    image_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)
    source = torchvision.datasets.MNIST
    transform = v2.RandomCrop(28, padding=2)

    def tensors(self, raw: Any) -> tuple[Tensor, Tensor]:
        """Images, uint8 (N, 1, 28, 28), and labels, int64 (N,)."""
        return raw.data.unsqueeze(1), raw.targets
