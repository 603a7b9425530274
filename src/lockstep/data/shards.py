"""Images in shards: tar files in the WebDataset convention."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.transforms import v2

from lockstep.core import UsageError
from lockstep.data.base import Split
from lockstep.data.file_index import publish_index
from lockstep.data.image_folder import ImageFiles, ImageFolder
from lockstep.data.packed import Entry, ShardIndex, ShardReader, copy_folder, find_index, is_current, list_shards

log = logging.getLogger(__name__)

_MAX_CLASSES = 2**24
_IMAGES = ("jpg", "jpeg", "png", "npy")


class Shards(ImageFolder):
    """Images in tar files: ``<root>/train/*.tar``, and likewise in ``val`` and ``test``.

    ``lockstep pack`` makes them of folders, and any others in the WebDataset convention will do: each sample has an image,
    ``<key>.jpg``, ``.png`` or, as uint8 pixels (H, W, 3), ``.npy``, and its label, a number or a name, in ``<key>.cls``, or
    as ``label`` or ``cls`` in ``<key>.json``.

    Order, crops and batches are those of ``ImageFolder``, and with the files of its folders the weights are too.

    Args:
        copy_to: Folder on a disk of each node, to which one process of each node copies the shards while training already
            reads them; each is read there from when it has been copied and verified. What is copied stays for the next run.
        **options: Arguments of ImageFolder.

    Raises:
        UsageError: See ``ImageFolder``.
    """

    def __init__(self, copy_to: Path | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.copy_to = copy_to

    def _prepare_index(self, folder: Path, path: Path) -> None:
        """Write the index of the shards in ``folder``; if the run has one, check that its shards are still there."""
        if not path.exists():
            publish_index(check_images(find_index(folder), folder).content, path, replace=not self.prepare_data_per_node)
        known = ShardIndex.open(path)
        known.verify()
        if is_current(known, list_shards(folder)):
            return
        found = find_index(folder)
        places = {shard.name: number for number, shard in enumerate(found.shards)}
        names = [shard.name for shard in known.shards]
        gone = [name for name in names if name not in places]
        changed = [
            name
            for number, name in enumerate(names)
            if name in places and known.samples_of(number) != found.samples_of(places[name])
        ]
        for files, problem in ((gone, "are gone"), (changed, "have changed")):
            if files:
                raise UsageError(
                    f"data.root: shards of {folder} that the run began with {problem}: {', '.join(files[:3])}"
                    f"{', …' if len(files) > 3 else ''}; restore them, or start a new run."
                )
        if added := sorted(places.keys() - set(names)):
            log.warning("%s in %s are newer than the run, which does not read them", ", ".join(added[:3]), folder)

    def training_classes(self) -> list[str]:
        """Names of the classes of the training set; where labels are numbers, these, up to the highest one."""
        return self._index("train").classes

    def open_files(self, split: Split, transform: v2.Transform, deterministic: bool) -> "ShardImages":
        """The shards of one split, as the run's index lists them.

        Raises:
            UsageError: Labels are numbers, and higher than those of the training set.
        """
        index = self._index(split)
        copies = None if self.copy_to is None else copy_folder(self.copy_to, self.folders[split])
        images = ShardImages(self.folders[split], index, transform, deterministic, copies)
        if index.class_names is None and split != "train" and self.folders["train"].is_dir():
            found, images.classes = len(images.classes), self.training_classes()
            if found > len(images.classes):
                raise UsageError(
                    f"data.root: {self.folders[split]} has the label {found - 1}; those of {self.folders['train']} end at "
                    f"{len(images.classes) - 1}."
                )
        return images

    def _index(self, split: Split) -> ShardIndex:
        path = None if self.index_folder is None else self.index_folder / f"{split}.index"
        if path is not None and path.exists():
            return ShardIndex.open(path)
        return check_images(find_index(self.folders[split]), self.folders[split])


class ShardImages(ImageFiles):
    """The images of ``index``, whose shards are in ``folder``, or, if they have been copied, in ``copies``."""

    def __init__(
        self, folder: Path, index: ShardIndex, transform: v2.Transform, deterministic: bool, copies: Path | None = None
    ) -> None:
        super().__init__(folder, index, transform, deterministic)
        self.reader, self._own_transform = ShardReader(folder, index, copies), transform

    def place(self, index: int) -> str:
        """Where an image is: shard and member."""
        return self.reader.place(index, self._entry(index))

    def read(self, index: int) -> bytes | Tensor:
        """The content of an image; as a tensor, uint8 (bytes,), if it is an array of pixels.

        That tensor is in memory that cannot be written, unless someone has replaced the transform, which may write.
        """
        entry = self._entry(index)
        if not entry.field.endswith("npy"):
            return self.reader.read(entry)
        content = self.reader.view(entry)
        return content if self.transform is self._own_transform else content.clone()

    def _entry(self, index: int) -> Entry:
        return next(entry for entry in self.reader.index.entries(index) if _is_image(entry.field))


def check_images(index: ShardIndex, folder: Path) -> ShardIndex:
    """Return ``index``; UsageError if a sample has no image, more than one, or no label."""
    images = [number for number, name in enumerate(index.fields) if _is_image(name)]
    counts = index.count_fields(images)
    for wrong, problem in (
        (counts == 0, f"has no {', '.join(_IMAGES[:-1])} or {_IMAGES[-1]}"),
        (counts > 1, "has more than one image"),
        (index.labels < 0, "has no label: a number or a name in its cls, or as label in its json"),
        (index.labels >= _MAX_CLASSES, "has a label that is too high for the number of a class"),
    ):
        if wrong.any():
            number = int(np.argmax(wrong))
            shard = index.shards[next(iter(index.entries(number))).shard].name
            raise UsageError(
                f"data.root: {folder / shard}: sample {index.key(number)!r} {problem}; "
                "for other data, write a DataModule with lockstep.data.ShardDataset."
            )
    return index


def _is_image(field: str) -> bool:
    return field.rpartition(".")[2] in _IMAGES
