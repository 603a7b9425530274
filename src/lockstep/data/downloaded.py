"""MNIST and CIFAR-10: torchvision downloads, verifies and reads them, and they fit in memory."""

import shlex
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from lockstep.core import UsageError
from lockstep.data.base import ImageData, InMemoryImages, Split, split_indices
from lockstep.data.prepare import prepare_folder


class DownloadedData(ImageData):
    """A torchvision data set with a training and a test set. A subclass defines ``source``, ``tensors`` and ``transform``.

    The data are in a subfolder of ``root``, and are downloaded if it is missing.

    Args:
        augment: Transform each training image at random.
        val_samples: Training images that are kept for validation, drawn from the seed.
        **options: Arguments of ImageData.
    """

    source: Any
    """The torchvision data set, called with ``root``, ``train`` and ``download``."""
    transform: v2.Transform
    """The augmentation of a training image."""

    def __init__(self, augment: bool = True, val_samples: int = 5_000, **options: Any) -> None:
        super().__init__(**options)
        self.augment, self.val_samples = augment, val_samples
        self.folder = self.root / type(self).__name__.lower()

    def tensors(self, raw: Any) -> tuple[Tensor, Tensor]:
        """Images, uint8 (N, C, H, W), and labels, int64 (N,), of a torchvision data set."""
        raise NotImplementedError(f"{type(self).__name__} must define tensors(raw)")

    def prepare_data(self) -> None:
        """Download, verify and unpack the data if the folder is missing."""
        name = type(self).__name__
        code = shlex.quote(f'from lockstep.data import {name}; {name}(root="data").prepare_data()')
        elsewhere = f"run python -c {code}, which makes data/{self.folder.name}"
        prepare_folder(self.folder, lambda folder: self.source(folder, download=True) and None, elsewhere)

    def load(self, split: Split) -> InMemoryImages:
        """One split, read from its files."""
        try:
            images, labels = self.tensors(self.source(self.folder, train=split != "test"))
        except PermissionError as error:
            raise UsageError(f"data.root: {error.filename} cannot be read; its permissions do not allow it.") from error
        except (OSError, RuntimeError, ValueError, AssertionError) as error:  # torchvision asserts what a header says
            reason = str(error) or type(error).__name__
            raise UsageError(
                f"data.root: {self.folder} is damaged ({reason}); remove the folder to download it again."
            ) from error
        if split == "test":
            return InMemoryImages(images, labels)
        chosen = split_indices(len(images), self.val_samples, self.seed, split)
        transform = self.transform if split == "train" and self.augment else None
        return InMemoryImages(images[chosen], labels[chosen], transform)


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
        return raw.data.unsqueeze(1), raw.targets


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
        return torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(raw.targets)
