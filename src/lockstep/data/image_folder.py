"""Folders of JPEG and PNG files, one folder for each class."""

import errno
import logging
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchcodec.decoders import decode_image
from torchvision.datasets.utils import download_and_extract_archive, extract_archive
from torchvision.transforms import v2

from lockstep.core import RunError, UsageError, World
from lockstep.data.base import ImageData, Split
from lockstep.data.prepare import prepare_folder
from lockstep.distributed import StopConsensus

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
        on_corrupt: If a file cannot be read or decoded, ``raise`` ends the run; ``skip`` leaves it out of its batch, logs its
            name and counts it in ``result.json``, and every other sample of the step weighs alike on any number of ranks. For
            that the ranks wait for each other at each batch. A rank may get an empty batch; the run ends if all do.
            ``predict`` always ends.
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
        self.rank_weight: float | None = None
        self._ranks: StopConsensus | None = None

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
                    f"{', '.join(map(printable, different[:5]))}{' …' if len(different) > 5 else ''} only in one of them."
                )
        self.num_classes = len(classes)
        if self.on_corrupt == "skip" and self._ranks is None and self.trainer is not None:
            self._ranks = StopConsensus(World(self.trainer.global_rank, self.trainer.world_size))

    def load(self, split: Split) -> "ImageFiles":
        """One split; only the names of its files are read."""
        if is_random := split == "train" and self.augment:
            transform = v2.Compose([v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()])
        else:
            transform = v2.Compose([v2.Resize(self.size * 8 // 7, antialias=True), v2.CenterCrop(self.size)])
        return ImageFiles(self.folders[split], transform, deterministic=not is_random)

    def collate(self, samples: Any) -> Any:
        """Images, uint8 (B, 3, size, size), labels, int64 (B,), and the files that could not be decoded.

        Raises:
            RunError: A file could not be decoded and ``on_corrupt`` is ``raise``.
        """
        corrupt = [sample for sample in samples if isinstance(sample, CorruptFile)]
        if corrupt and self.on_corrupt == "raise":
            raise RunError(corrupt[0].error)
        decoded = [sample for sample in samples if not isinstance(sample, CorruptFile)]
        if not decoded:
            return torch.zeros(0, *self.image_shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), corrupt
        images, labels = default_collate(decoded)
        return images, labels, corrupt

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Remove undecodable files from the batch, log and count them, and set the ``rank_weight`` of the rest.

        Raises:
            RunError: A file could not be decoded in predict, or no file of the batch could on any rank.
        """
        images, labels, corrupt = batch
        if corrupt and self.trainer is not None and self.trainer.predicting:
            raise RunError(f"{corrupt[0].path} cannot be decoded, and predict skips no sample; replace the file or remove it.")
        for file in corrupt:
            if file.path not in self.skipped:
                log.warning("skipped %s: it cannot be decoded", file.path)
        self.skipped.update(file.path for file in corrupt)
        if self._ranks is not None:
            total = self._ranks.total(len(labels))
            if not total:
                raise RunError(f"None of the files of a batch can be decoded; the first: {corrupt[0].error}")
            self.rank_weight = len(labels) * self._world_size / total
        return images, labels


def class_names(folder: Path) -> list[str]:
    """The subfolders of ``folder`` that are not hidden, sorted; the index of a name is its label.

    A link to the folder itself or to a folder that contains it is not a class.
    """
    above = _with_parents(folder)
    return sorted(entry.name for entry in _visible(folder) if entry.is_dir() and _identity(entry.stat()) not in above)


def _image_files(folder: str, above: Set[tuple[int, int]]) -> Iterator[str]:
    """The image files in ``folder`` and its subfolders, without hidden ones; ``above``: ``folder`` and what contains it."""
    for entry in _visible(folder):  # Path.rglob takes ten times as long for a million files
        if not entry.is_dir():
            if entry.name.lower().endswith(_SUFFIXES):
                yield entry.path
        elif _identity(entry.stat()) not in above:  # else a loop of links
            yield from _image_files(entry.path, above | {_identity(entry.stat())})


def _visible(folder: str | Path) -> "list[os.DirEntry[str]]":
    """Entries of ``folder``, without hidden ones and links to themselves."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".") and not _is_loop(entry)]
    except OSError as error:
        raise UsageError(f"data.root: {printable(folder)} cannot be read ({error.strerror}).") from error


def _is_loop(entry: "os.DirEntry[str]") -> bool:
    try:
        entry.is_dir()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _with_parents(folder: Path) -> Set[tuple[int, int]]:
    """The identities of ``folder`` and of all folders that contain it."""
    return {_identity(place.stat()) for place in (folder.resolve(), *folder.resolve().parents)}


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def printable(path: str | Path) -> str:
    """``path`` for messages and logs, with the bytes of a name that is not UTF-8 as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


@dataclass(frozen=True)
class CorruptFile:
    """The sample of a file that cannot be read or decoded."""

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
            images = sorted(_image_files(os.path.join(folder, name), _with_parents(folder) | _with_parents(folder / name)))
            if not images:
                raise UsageError(f"data.root: class folder {printable(folder / name)} holds no {', '.join(_SUFFIXES)} file.")
            self.files += [(path, label) for path in images]
        self.transform, self.deterministic = transform, deterministic

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | CorruptFile:
        path, label = self.files[index]
        name = printable(path)
        try:
            image = decode_image(Path(path).read_bytes(), mode="RGB")  # it does not open a path that is not UTF-8
        except OSError as error:
            return CorruptFile(name, f"{name} cannot be read ({error.strerror}); restore it, or set --data.on_corrupt skip.")
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0].rpartition(": ")[2]
            message = f"{name} is not a complete JPEG or PNG ({reason}); replace it, or set --data.on_corrupt skip."
            return CorruptFile(name, message)
        return self.transform(image), label
