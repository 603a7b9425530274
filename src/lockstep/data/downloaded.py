"""What MNIST and CIFAR-10 share: torchvision downloads, checks and reads them, they fit in memory, and they come without
a validation set.
"""

from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.transforms import v2

from lockstep.core import UsageError
from lockstep.data.base import ImageData, InMemoryImages, Part, split_indices
from lockstep.data.prepare import prepare_folder


class DownloadedData(ImageData):
    """A torchvision data set with a training and a test part. A subclass gives ``source``, ``tensors`` and ``transform``.

    Args:
        root: The data are in a subfolder of it; downloaded if missing.
        augment: Change each training image at random.
        val_samples: Training images that are kept for validation, drawn from the seed.
        batch_size: See ImageData.
        batch_size_per_rank: See ImageData.
        num_workers: See ImageData.
        drop_last: See ImageData.
        seed: See ImageData.
    """

    source: Any
    """The torchvision data set, called with ``root``, ``train`` and ``download``."""
    transform: v2.Transform
    """What ``augment`` does to an image."""

    def __init__(
        self,
        root: Path = Path("data"),
        augment: bool = True,
        val_samples: int = 5_000,
        batch_size: int | None = None,
        batch_size_per_rank: int | None = None,
        num_workers: int | None = None,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, batch_size_per_rank, num_workers, drop_last, seed)
        self.augment, self.val_samples = augment, val_samples
        self.folder = self.root / type(self).__name__.lower()

    def tensors(self, raw: Any) -> tuple[Tensor, Tensor]:
        """Images, uint8 (N, C, H, W), and labels, int64 (N,), of a torchvision data set."""
        raise NotImplementedError(f"{type(self).__name__} must define tensors(raw)")

    def prepare_data(self) -> None:
        """Download, verify and unpack, where that has not been done."""
        prepare_folder(self.folder, lambda folder: self.source(folder, download=True) and None)

    def load(self, part: Part) -> InMemoryImages:
        """One part, read from its files."""
        try:
            images, labels = self.tensors(self.source(self.folder, train=part != "test"))
        except (OSError, RuntimeError) as error:
            raise UsageError(f"data.root: {self.folder} is not whole ({error}); remove it and it is made again.") from error
        if part == "test":
            return InMemoryImages(images, labels)
        chosen = split_indices(len(images), self.val_samples, self.seed, part)
        return InMemoryImages(images[chosen], labels[chosen], self.transform if part == "train" and self.augment else None)
