"""Folders of JPEG and PNG files, one folder for each class."""

import logging
import math
import os
import time
import zlib
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from tarfile import TarError
from typing import Any, Literal
from zipfile import BadZipFile

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets.utils import check_integrity, download_and_extract_archive, extract_archive

from lockstep.config import check_archive
from lockstep.core import RunError, StorageError, UsageError, World, count, may_pass
from lockstep.data.augment import Blends
from lockstep.data.base import STAGE_SPLITS, ImageData, Split
from lockstep.data.decode import center_crop, random_crop
from lockstep.data.encoded import Decoder, EncodedBatch, EncodedCrop, check_gpu_decoding
from lockstep.data.file_index import FileIndex, class_names, printable, publish_index, scan
from lockstep.data.packed import explain
from lockstep.data.prepare import prepare_folder
from lockstep.distributed import StopConsensus

log = logging.getLogger(__name__)


class ImageFolder(ImageData):
    """JPEG and PNG files, grey or colour, of any size: ``<root>/train/<class>/*.jpg``, and likewise in ``val`` and ``test``.

    Training: a random crop of 8 % to 100 % of the image, resized to ``size`` × ``size`` and flipped at random. Evaluation: the
    square in the center, with 7/8 of the shorter side, resized (Szegedy et al. 2015 and torchvision's reference training).

    Args:
        root: Folder of the three splits.
        train: Its subfolder for training.
        val: Its subfolder for validation.
        test: Its subfolder for testing.
        size: Height and width of an image in a batch, in pixels.
        augment: Crop and flip training images at random; else they are treated as in evaluation.
        decode: Where JPEGs are decoded: ``cpu``, in the workers, or ``gpu``, a batch at once with nvJPEG, with the same crops.
            Its pixels differ a little from those of a CPU.
        on_corrupt: If a file cannot be read or decoded, ``raise`` ends the run; ``skip`` leaves it out of its batch, logs its
            name and counts it in ``result.json``. All other samples of the step have the same weight on any number of ranks,
            for which the ranks synchronize at each batch. The run ends if no rank can decode any file of a batch. A rank
            without one takes the step with a stand-in of the same shape, which changes no gradient, batch statistic, metric or
            logged value. With ``sync_batchnorm`` its training batch is empty instead. ``predict`` always ends.
        archive: A tar or zip file, or its URL, that is unpacked into ``root`` if ``root`` does not exist. To copy the data to
            a local disk of each node, set ``root`` to a folder there and ``shared_filesystem: false``.
        archive_md5: MD5 checksum of ``archive``, verified before it is unpacked; required for a URL that is not https.
        mean: Mean of each channel, in a range of 0 to 1; ImageNet's by default.
        std: Standard deviation of each channel, likewise.
        **options: Arguments of ImageData.

    Attributes:
        index_folder: Folder for the list of the files of each split. One process writes it, and all map it into memory, so all
            attempts of a run read the same files in the same order. None: each process lists the files itself.

    Raises:
        UsageError: A number is out of range, or an archive comes over http without a checksum.
    """

    in_memory = False
    index_folder: Path | None = None

    def __init__(
        self,
        root: Path = Path("data/images"),
        train: str = "train",
        val: str = "val",
        test: str = "test",
        size: int = 224,
        augment: bool = True,
        decode: Literal["cpu", "gpu"] = "cpu",
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
        check_archive(archive, archive_md5)
        self.folders: dict[Split, Path] = {"train": self.root / train, "val": self.root / val, "test": self.root / test}
        self.size, self.augment, self.on_corrupt = size, augment, on_corrupt
        self.decode, self.archive, self.archive_md5 = decode, archive, archive_md5
        self.image_shape, self.mean, self.std = (3, size, size), mean, std
        self.skipped: set[str] = set()
        self.rank_weight: float | None = None
        self._ranks: StopConsensus | None = None

    def prepare_data(self) -> None:
        """Unpack ``archive`` into ``root`` if ``root`` is missing, and list the files of the splits that the Trainer will read.

        Raises:
            UsageError: A split is not complete, files that the run has read are gone, or the GPU cannot decode.
        """
        self._check_decoding()
        if self.archive is not None:
            prepare_folder(self.root, self._unpack)
        if self.index_folder is not None and self.trainer is not None and self.trainer.state.fn is not None:
            for split in STAGE_SPLITS[self.trainer.state.fn.value]:
                self._prepare_index(self.folders[split], self.index_folder / f"{split}.index")

    def _prepare_index(self, folder: Path, path: Path) -> None:
        """Write the index of ``folder``; if it exists, check that its files do."""
        if not path.exists():
            publish_index(scan(folder), path, replace=not self.prepare_data_per_node)
        known = FileIndex.open(path)
        known.verify()
        if known.is_current(folder):
            return
        content = scan(folder)
        gone, added = known.difference(FileIndex(content))
        place = f"of {printable(folder)} that the run began with are gone"
        if gone and self.on_corrupt == "raise":
            raise UsageError(f"data.root: {_count(gone)} {place}; restore them, or start a new run.")
        if gone:
            log.warning("%s %s, and are skipped", _count(gone), place)
        if added:
            log.warning("%s of %s are newer than the run, which does not read them", _count(added), printable(folder))
        if not gone and not added and not self.prepare_data_per_node:  # else each node has other folders
            publish_index(content, path, replace=True)

    def _unpack(self, folder: Path) -> None:
        assert self.archive is not None
        try:
            if "://" in self.archive:
                download_and_extract_archive(self.archive, folder, md5=self.archive_md5, remove_finished=True)
                return
            if self.archive_md5 is not None and not check_integrity(self.archive, self.archive_md5):
                raise RuntimeError(f"{self.archive} is missing or does not have data.archive_md5 {self.archive_md5}")
            extract_archive(self.archive, folder)
        except (EOFError, LZMAError, TarError, BadZipFile, zlib.error) as error:
            raise RuntimeError(f"{self.archive} is damaged: {error}") from error

    def setup(self, stage: str) -> None:
        """List the files of the splits that ``stage`` needs.

        Raises:
            UsageError: Two splits have different classes, or the GPU cannot decode.
        """
        self._check_decoding()
        super().setup(stage)
        found = {split: files.classes for split, files in self._datasets.items() if isinstance(files, ImageFiles)}
        # The training set decides if it exists: a test set that lacks a class would number the other classes wrongly.
        if "train" not in found and self.folders["train"].is_dir():
            found = {"train": self.training_classes(), **found}
        (first, classes), *others = found.items()
        for split, names in others:
            if names != classes:
                different = sorted(set(names) ^ set(classes))
                raise UsageError(
                    f"data.root: {self.folders[first]} and {self.folders[split]} have different classes: "
                    f"{', '.join(map(printable, different[:5]))}{' …' if len(different) > 5 else ''} only in one of them."
                )
        self.num_classes, self.classes = len(classes), [printable(name) for name in classes]
        if self.on_corrupt == "skip" and self._ranks is None and self.trainer is not None:
            self._ranks = StopConsensus(World(self.trainer.global_rank, self.trainer.world_size))

    def training_classes(self) -> list[str]:
        """Names of the classes of the training set."""
        return class_names(self.folders["train"])

    def load(self, split: Split) -> "ImageFiles":
        """One split; opens no image."""
        is_random = split == "train" and self.augment
        decoder = Decoder(random_crop if is_random else center_crop, self.size, on_gpu=self.decode == "gpu")
        return self.open_files(split, decoder, deterministic=not is_random)

    def open_files(self, split: Split, decoder: Decoder, deterministic: bool) -> "ImageFiles":
        """The files of one split, as the run's index lists them."""
        path = None if self.index_folder is None else self.index_folder / f"{split}.index"
        has_index = path is not None and path.exists()
        if path is not None and not has_index:
            log.warning("%s does not exist (is prepare_data overridden?): each process lists the files itself", path)
        index = FileIndex.open(path) if path is not None and has_index else FileIndex(scan(self.folders[split]))
        return ImageFiles(self.folders[split], index, decoder, deterministic)

    @property
    def _decoding_device(self) -> torch.device:
        assert self.trainer is not None
        return self.trainer.strategy.root_device

    def _check_decoding(self) -> None:
        if self.decode == "gpu" and self.trainer is not None:
            check_gpu_decoding(self._decoding_device)

    def collate(self, samples: Any) -> Any:
        """Images, uint8 (B, 3, size, size), labels, int64 (B,), the files that could not be decoded, and ``Blends`` or None.

        Images that the GPU decodes are an ``EncodedBatch``.

        Raises:
            RunError: A file could not be decoded and ``on_corrupt`` is ``raise``.
        """
        corrupt = [sample for sample in samples if isinstance(sample, CorruptFile)]
        if corrupt and self.on_corrupt == "raise":
            raise RunError(corrupt[0].error)
        decoded = {slot: sample for slot, sample in enumerate(samples) if not isinstance(sample, CorruptFile)}
        if not decoded:
            return torch.zeros(0, *self.image_shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), corrupt, None
        images, labels, *drawn = map(list, zip(*decoded.values(), strict=True))
        is_encoded = any(isinstance(image, EncodedCrop) for image in images)
        batch = EncodedBatch.collate(images) if is_encoded else self._memory.stack(images)
        return batch, torch.tensor(labels), corrupt, Blends.collate(drawn[0], list(decoded)) if drawn else None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Decode what the GPU decodes, remove undecodable files, log and count them, and set the ``rank_weight`` of the rest.

        Raises:
            RunError: A file could not be decoded in predict, or no file of the batch could on any rank; or the GPU could not
                decode one and ``on_corrupt`` is ``raise``.
        """
        images, labels, corrupt, blends = batch
        if isinstance(images, EncodedBatch):
            images, errors = images.decode(self.size, self._decoding_device, self.transforms)
            if errors:
                corrupt = corrupt + [CorruptFile.damaged(*error) for error in errors.values()]
                if self.on_corrupt == "raise":
                    raise RunError(corrupt[-1].error)
                kept = torch.tensor([number for number in range(len(labels)) if number not in errors], dtype=torch.int64)
                images, labels, blends = images[kept], labels[kept], blends and blends.select(kept)
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
            assert self.trainer is not None
            if not len(labels) and not (self.trainer.training and _has_sync_batchnorm(self.trainer.lightning_module)):
                images, labels = self._stand_in(max(2, len(corrupt)))  # batch norm cannot train on one sample
                blends = None
        return (images, labels) if blends is None else (images, labels, blends)

    on_before_batch_transfer.takes_device_batches = True  # type: ignore[attr-defined]

    def _stand_in(self, samples: int) -> tuple[Tensor, Tensor]:
        """Images and labels of the shape and type of a batch, made without a file; no image has a single colour."""
        shape = (samples, *self.image_shape)
        images = torch.arange(math.prod(shape)).remainder(251).to(torch.uint8).reshape(shape)
        return images, torch.zeros(samples, dtype=torch.int64)


def _has_sync_batchnorm(module: nn.Module) -> bool:
    return any("SyncBatchNorm" in type(part).__name__ for part in module.modules())


@dataclass(frozen=True)
class CorruptFile:
    """The sample of a file that cannot be read or decoded."""

    path: str
    error: str

    @classmethod
    def damaged(cls, path: str, error: Exception) -> "CorruptFile":
        """A file whose decoding failed with ``error``."""
        return cls(path, f"{path} is not a complete JPEG or PNG ({explain(error)}); replace it, or set --data.on_corrupt skip.")


class ImageFiles(Dataset[Any]):
    """The files of ``index``, whose names are relative to ``folder``.

    A sample is the crop that ``decoder`` takes, uint8 (3, size, size), or an ``EncodedCrop``, and its label; or a
    ``CorruptFile``.

    Attributes:
        read_seconds: Seconds spent so far on reading files.
    """

    read_seconds = 0.0

    def __init__(self, folder: Path, index: Any, decoder: Decoder, deterministic: bool) -> None:
        self.folder, self.index, self.classes = folder, index, index.classes
        self.decoder, self.deterministic = decoder, deterministic

    def __len__(self) -> int:
        return len(self.index)

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Path and label of each file; each call makes a new list."""
        return [(self.place(index), label) for index, label in enumerate(self.targets)]

    @property
    def targets(self) -> list[int]:
        """Label of each file; each call makes a new list."""
        targets: list[int] = self.index.labels.tolist()
        return targets

    def place(self, index: int) -> str:
        """Where an image is: the path of its file."""
        return os.path.join(self.folder, self.index[index][0])

    def read(self, index: int) -> bytes | Tensor:
        """The content of an image; as a tensor, uint8 (bytes,), if it is an array of pixels."""
        with open(self.place(index), "rb", buffering=0) as file:
            return file.read()

    def __getitem__(self, index: int) -> tuple[Tensor | EncodedCrop, int] | CorruptFile:
        begin = time.perf_counter()
        try:
            content = self.read(index)
            self.read_seconds += time.perf_counter() - begin
            return self.decoder(content, self.place, index), int(self.index.labels[index])
        except OSError as error:
            name = printable(self.place(index))
            if may_pass(error):  # to skip it would change the samples of the run
                raise StorageError(f"{name} cannot be read ({error.strerror}).") from error
            return CorruptFile(name, f"{name} cannot be read ({error.strerror}); restore it, or set --data.on_corrupt skip.")
        except (RuntimeError, ValueError) as error:
            return CorruptFile.damaged(printable(self.place(index)), error)


def _count(names: list[str]) -> str:
    """The number of files, and the names of the first ones."""
    shown = ", ".join(map(printable, names[:3]))
    return f"{count(len(names), 'file')} ({shown}{', …' if len(names) > 3 else ''})"
