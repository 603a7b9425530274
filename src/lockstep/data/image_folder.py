"""Folders of JPEG and PNG files, one folder a class."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torchvision
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchcodec.decoders import decode_image
from torchvision.datasets.utils import download_and_extract_archive, extract_archive
from torchvision.transforms import v2

from lockstep.core import RunError, UsageError
from lockstep.data.base import ImageData, Part
from lockstep.data.prepare import prepare_folder

log = logging.getLogger(__name__)


_SUFFIXES = (".jpg", ".jpeg", ".png")


class ImageFolder(ImageData):
    """``<root>/train/<class>/*.jpg``, and the same below ``val`` and ``test``; JPEG and PNG, grey or colour, any size.

    Training: a random crop of 8 % to 100 % of the image, scaled to ``size`` × ``size``, mirrored at random. Evaluation: the
    shorter side scaled to 8/7 of ``size``, the middle cut out (Szegedy et al. 2015 and torchvision's reference training).

    Args:
        root: Folder of the three parts.
        train: Its subfolder for training.
        val: Its subfolder for validation.
        test: Its subfolder for testing.
        size: Height and width of an image in a batch, in pixels.
        augment: Crop and mirror training images at random; else they are treated as in evaluation.
        on_corrupt: What a file that cannot be decoded does: ``raise`` ends the run with its name; ``skip`` leaves it out of
            its batch, names it in the log and counts it in ``result.json``; not in ``predict``, which leaves none out.
        archive: A tar or zip file, or its address, that is unpacked into ``root`` where ``root`` does not exist. To copy
            data to a disk of each node, set ``root`` there and ``shared_filesystem: false``.
        archive_md5: Checksum of ``archive``, verified before it is unpacked.
        mean: Of each channel, in a range of 0 to 1; ImageNet's by default.
        std: Of each channel, likewise.
        batch_size: See ImageData.
        batch_size_per_rank: See ImageData.
        num_workers: See ImageData.
        drop_last: See ImageData.
        seed: See ImageData.
    """

    in_memory = False

    def __init__(
        self,
        root: Path = Path("data/images"),
        train: str = "train",
        val: str = "val",
        test: str = "test",
        size: int = 224,
        augment: bool = True,
        on_corrupt: Literal["raise", "skip"] = "raise",
        archive: str | None = None,
        archive_md5: str | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        batch_size: int | None = None,
        batch_size_per_rank: int | None = None,
        num_workers: int | None = None,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, batch_size_per_rank, num_workers, drop_last, seed)
        if size < 1:
            raise UsageError(f"data.size: {size} must be 1 or more pixels.")
        self.folders: dict[Part, Path] = {"train": self.root / train, "val": self.root / val, "test": self.root / test}
        self.size, self.augment, self.on_corrupt = size, augment, on_corrupt
        self.archive, self.archive_md5 = archive, archive_md5
        self.image_shape, self.mean, self.std = (3, size, size), mean, std
        self.skipped: set[str] = set()

    def prepare_data(self) -> None:
        """Unpack ``archive``, where there is one and it has not been done."""
        if self.archive is not None:
            prepare_folder(self.root, self._unpack)

    def _unpack(self, folder: Path) -> None:
        assert self.archive is not None
        if "://" in self.archive:
            download_and_extract_archive(self.archive, folder, md5=self.archive_md5, remove_finished=True)
            return
        if self.archive_md5 is not None and not torchvision.datasets.utils.check_integrity(self.archive, self.archive_md5):
            raise RuntimeError(f"{self.archive} is missing or does not have data.archive_md5 {self.archive_md5}")
        extract_archive(self.archive, folder)

    def setup(self, stage: str) -> None:
        """Find the files of the parts that ``stage`` needs; every part must have the same classes."""
        super().setup(stage)
        found = {part: files.classes for part, files in self._parts.items() if isinstance(files, ImageFiles)}
        # A test set that lacks a class would number the others wrongly: training decides, where it is there.
        if "train" not in found and self.folders["train"].is_dir():
            found = {"train": class_names(self.folders["train"]), **found}
        (first, classes), *others = found.items()
        for part, names in others:
            if names != classes:
                odd = sorted(set(names) ^ set(classes))
                raise UsageError(
                    f"data.root: {self.folders[first]} and {self.folders[part]} have different classes: "
                    f"{', '.join(odd[:5])}{' …' if len(odd) > 5 else ''} only in one of them."
                )
        self.num_classes = len(classes)

    def load(self, part: Part) -> "ImageFiles":
        """One part; only the names of its files are read."""
        edge = self.size * 8 // 7
        transform = v2.Compose([v2.Resize(edge, antialias=True), v2.CenterCrop(self.size)])
        if part == "train" and self.augment:
            transform = v2.Compose([v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()])
        return ImageFiles(self.folders[part], transform, deterministic=not (part == "train" and self.augment))

    def collate(self, samples: Any) -> Any:
        """A batch of the samples that could be decoded, and the names of the files that could not."""
        broken = [sample for sample in samples if isinstance(sample, CorruptFile)]
        if broken and self.on_corrupt == "raise":
            raise RunError(broken[0].message)
        whole = [sample for sample in samples if not isinstance(sample, CorruptFile)]
        if not whole:
            raise RunError(f"None of the {len(samples)} files of a batch can be decoded; the first: {broken[0].message}")
        images, labels = default_collate(whole)
        return images, labels, [sample.path for sample in broken]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take out, name and count the files that could not be decoded."""
        images, labels, broken = batch
        if broken and self.trainer is not None and self.trainer.predicting:
            raise RunError(f"{broken[0]} cannot be decoded, and predict leaves no sample out; replace it, or take it away.")
        for path in broken:
            if path not in self.skipped:
                log.warning("skipped %s: it cannot be decoded", path)
        self.skipped.update(broken)
        return images, labels


def class_names(folder: Path) -> list[str]:
    """The subfolders of ``folder``, in the order in which classes are numbered."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


class CorruptFile:
    """Stands for a file that is no whole JPEG or PNG.

    Args:
        path: The file.
        reason: What the decoder said.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.message = f"{path} is no whole JPEG or PNG ({reason}); replace it, or set --data.on_corrupt skip."


class ImageFiles(Dataset[Any]):
    """The files of one part; a sample is an image, uint8 (3, size, size), and its class, or an ``Undecodable``.

    Args:
        folder: One subfolder a class; classes are numbered in the order of their names.
        transform: Applied to each decoded image, uint8 (3, H, W).
        deterministic: Whether ``transform`` uses no randomness.

    Raises:
        UsageError: The folder is missing, has no classes, or a class has no image.
    """

    def __init__(self, folder: Path, transform: v2.Transform, deterministic: bool) -> None:
        if not folder.is_dir():
            raise UsageError(f"data.root: there is no folder {folder}; it must hold one subfolder of images for each class.")
        names = class_names(folder)
        if not names:
            raise UsageError(f"data.root: {folder} must hold one subfolder of images for each class; it holds none.")
        self.classes: Sequence[str] = names
        self.files: list[tuple[str, int]] = []
        for label, name in enumerate(names):
            # Not Path.rglob: it takes ten times as long for a million files.
            files = [os.path.join(at, file) for at, _, held in os.walk(folder / name, followlinks=True) for file in held]
            images = sorted(path for path in files if path.lower().endswith(_SUFFIXES))
            if not images:
                raise UsageError(f"data.root: class folder {folder / name} holds no {', '.join(_SUFFIXES)} file.")
            self.files += [(path, label) for path in images]
        self.transform, self.deterministic = transform, deterministic

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | CorruptFile:
        path, label = self.files[index]
        try:
            image = decode_image(path, mode="RGB")
        except (RuntimeError, ValueError) as error:
            return CorruptFile(path, str(error).splitlines()[0].rpartition(": ")[2])
        return self.transform(image), label
