"""The base of MNIST and CIFAR-10: torchvision downloads, verifies and reads them, and they fit in memory."""

from typing import Any

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
        prepare_folder(self.folder, lambda folder: self.source(folder, download=True) and None)

    def load(self, split: Split) -> InMemoryImages:
        """One split, read from its files."""
        try:
            images, labels = self.tensors(self.source(self.folder, train=split != "test"))
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"data.root: {self.folder} is damaged ({error}); remove the folder, and it is downloaded again."
            ) from error
        if split == "test":
            return InMemoryImages(images, labels)
        chosen = split_indices(len(images), self.val_samples, self.seed, split)
        transform = self.transform if split == "train" and self.augment else None
        return InMemoryImages(images[chosen], labels[chosen], transform)
