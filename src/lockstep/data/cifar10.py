"""CIFAR-10: 60,000 colour images of 32×32. torchvision downloads, verifies and reads the batch files."""

from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from lockstep.data.downloaded import DownloadedData


class CIFAR10(DownloadedData):
    """Ten classes of objects as images (3, 32, 32): 45,000 for training, 5,000 for validation, 10,000 for testing.

    ``<root>/cifar10/cifar-10-batches-py`` holds the batch files. ``augment`` flips an image at random and shifts it, by four
    pixels at most.
    """

    num_classes = 10
    image_shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    source = torchvision.datasets.CIFAR10
    transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def tensors(self, raw: Any) -> tuple[Tensor, Tensor]:
        """Images, uint8 (N, 3, 32, 32), and labels, int64 (N,)."""
        return torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(raw.targets)
