"""Folders of JPEG and PNG files, one folder for each class."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torchvision
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchcodec.decoders import decode_image
from torchvision.datasets.utils import download_and_extract_archive, extract_archive
from torchvision.transforms import v2

from lockstep.core import RunError, UsageError
from lockstep.data.base import ImageData, Split
from lockstep.data.prepare import prepare_folder

log = logging.getLogger(__name__)

_SUFFIXES = (".jpg", ".jpeg", ".png")


class ImageFolder(ImageData):
    """JPEG and PNG files, grey or colour, of any size: ``<root>/train/<class>/*.jpg``, and likewise in ``val`` and ``test``.

    Training: a random crop of 8 % to 100 % of the image, resized to ``size`` × ``size`` and flipped at random. Evaluation: the
    shorter side is resized to 8/7 of ``size``, then the center is cropped (Szegedy et al. 2015 and torchvision's reference
    training).

    Args:
        root: Folder of the three splits.
        train: Its subfolder for training.
        val: Its subfolder for validation.
        test: Its subfolder for testing.
        size: Height and width of an image in a batch, in pixels.
        augment: Crop and flip training images at random; else they are treated as in evaluation.
        on_corrupt: If a file cannot be decoded, ``raise`` ends the run; ``skip`` leaves it out of its batch, logs its name and
            counts it in ``result.json``. ``predict`` always ends.
        archive: A tar or zip file, or its URL, that is unpacked into ``root`` if ``root`` does not exist. To copy the data to
            a local disk of each node, set ``root`` to a folder there and ``shared_filesystem: false``.
        archive_md5: MD5 checksum of ``archive``, verified before it is unpacked; required for a URL that is not https.
        mean: Mean of each channel, in a range of 0 to 1; ImageNet's by default.
        std: Standard deviation of each channel, likewise.
        **options: Arguments of ImageData.

    Raises:
        UsageError: A number is out of range, or an archive comes over http without a checksum.
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
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        if size < 1:
            raise UsageError(f"data.size: {size} must be 1 or more pixels.")
        if archive is not None and "://" in archive and not archive.startswith(("https://", "file://")) and not archive_md5:
            raise UsageError(
                f"data.archive: {archive} can be replaced on its way, because its address is not encrypted; use https, or set "
                "data.archive_md5 to its checksum."
            )
        self.folders: dict[Split, Path] = {"train": self.root / train, "val": self.root / val, "test": self.root / test}
        self.size, self.augment, self.on_corrupt = size, augment, on_corrupt
        self.archive, self.archive_md5 = archive, archive_md5
        self.image_shape, self.mean, self.std = (3, size, size), mean, std
        self.skipped: set[str] = set()

    def prepare_data(self) -> None:
        """Unpack ``archive`` into ``root`` if ``root`` is missing."""
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
        """List the files of the splits that ``stage`` needs; UsageError if two splits have different classes."""
        super().setup(stage)
        found = {split: files.classes for split, files in self._datasets.items() if isinstance(files, ImageFiles)}
        # The training set decides if it exists: a test set that lacks a class would number the other classes wrongly.
        if "train" not in found and self.folders["train"].is_dir():
            found = {"train": class_names(self.folders["train"]), **found}
        (first, classes), *others = found.items()
        for split, names in others:
            if names != classes:
                different = sorted(set(names) ^ set(classes))
                raise UsageError(
                    f"data.root: {self.folders[first]} and {self.folders[split]} have different classes: "
                    f"{', '.join(different[:5])}{' …' if len(different) > 5 else ''} only in one of them."
                )
        self.num_classes = len(classes)

    def load(self, split: Split) -> "ImageFiles":
        """One split; only the names of its files are read."""
        if is_random := split == "train" and self.augment:
            transform = v2.Compose([v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()])
        else:
            transform = v2.Compose([v2.Resize(self.size * 8 // 7, antialias=True), v2.CenterCrop(self.size)])
        return ImageFiles(self.folders[split], transform, deterministic=not is_random)

    def collate(self, samples: Any) -> Any:
        """Images, uint8 (B, 3, size, size), labels, int64 (B,), and the paths of the files that could not be decoded.

        Raises:
            RunError: A file could not be decoded and ``on_corrupt`` is ``raise``, or no file of the batch could.
        """
        corrupt = [sample for sample in samples if isinstance(sample, CorruptFile)]
        if corrupt and self.on_corrupt == "raise":
            raise RunError(corrupt[0].error)
        decoded = [sample for sample in samples if not isinstance(sample, CorruptFile)]
        if not decoded:
            raise RunError(f"None of the {len(samples)} files of a batch can be decoded; the first: {corrupt[0].error}")
        images, labels = default_collate(decoded)
        return images, labels, [sample.path for sample in corrupt]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Remove the paths of undecodable files from the batch, log and count them; in predict, raise RunError."""
        images, labels, corrupt = batch
        if corrupt and self.trainer is not None and self.trainer.predicting:
            raise RunError(f"{corrupt[0]} cannot be decoded, and predict skips no sample; replace the file or remove it.")
        for path in corrupt:
            if path not in self.skipped:
                log.warning("skipped %s: it cannot be decoded", path)
        self.skipped.update(corrupt)
        return images, labels


def class_names(folder: Path) -> list[str]:
    """The subfolders of ``folder``, sorted; the index of a name is its label."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


@dataclass(frozen=True)
class CorruptFile:
    """The sample of a file that cannot be decoded."""

    path: str
    error: str


class ImageFiles(Dataset[Any]):
    """The files of one split, in one subfolder for each class; labels follow the order of the subfolders' names.

    A sample is ``transform`` of the decoded image, uint8 (3, H, W), and its label, or a ``CorruptFile``.

    Raises:
        UsageError: The folder is missing, has no classes, or a class has no image.
    """

    def __init__(self, folder: Path, transform: v2.Transform, deterministic: bool) -> None:
        self.classes = class_names(folder) if folder.is_dir() else []
        if not self.classes:
            problem = "has no subfolder" if folder.is_dir() else "does not exist"
            raise UsageError(f"data.root: {folder} {problem}; it must hold one subfolder of images for each class.")
        self.files: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            # Path.rglob takes ten times as long for a million files.
            files = [os.path.join(at, file) for at, _, found in os.walk(folder / name, followlinks=True) for file in found]
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
            reason = str(error).splitlines()[0].rpartition(": ")[2]
            message = f"{path} is not a complete JPEG or PNG ({reason}); replace it, or set --data.on_corrupt skip."
            return CorruptFile(path, message)
        return self.transform(image), label
