"""Images in shards: tar files in the WebDataset convention."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lockstep.core import UsageError
from lockstep.data.base import Split
from lockstep.data.encoded import Decoder
from lockstep.data.file_index import publish_index
from lockstep.data.image_folder import ImageFiles, ImageFolder
from lockstep.data.packed import Entry, ShardIndex, ShardReader, copy_folder, find_index, is_current, list_shards

log = logging.getLogger(__name__)

_MAX_CLASSES = 2**20
_PRIORITIES = 4


class Shards(ImageFolder):
    """Images in tar files: ``<root>/train/*.tar``, and likewise in ``val`` and ``test``.

    ``lockstep pack`` makes them from folders; others in the WebDataset convention work too. Each sample has an image,
    ``<key>.jpg``, ``.png`` or, as uint8 pixels (H, W, 3), ``.npy``. Its label, a number or a name, is in ``<key>.cls``, or is
    ``label`` or ``cls`` in ``<key>.json``.

    Order, crops and batches are those of ``ImageFolder``: shards packed from its folders give the same weights.

    Args:
        copy_to: Folder on a local disk of each node. One process of each node copies the shards there while training already
            reads the originals. A copy is read as soon as it is verified, and stays for the next run.
        image: Field that holds the image, such as ``png``. By default the one named jpg, jpeg or png, else the one whose name
            ends with one of these, else npy.
        **options: Arguments of ImageFolder.

    Raises:
        UsageError: See ``ImageFolder``.
    """

    def __init__(self, copy_to: Path | None = None, image: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.copy_to, self.image = copy_to, image

    def _prepare_index(self, folder: Path, path: Path) -> None:
        """Write the index of the shards in ``folder``; if the run has one, check that its shards are still there."""
        if not path.exists():
            index = check_images(find_index(folder), folder, self.image)  # a run keeps no index that it cannot use
            publish_index(index.content, path, replace=not self.prepare_data_per_node)
        known = ShardIndex.open(path)
        known.verify()
        check_images(known, folder, self.image)
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
        """Names of the classes of the training set; if labels are numbers, all numbers up to the highest label."""
        return self._index("train").classes

    def open_files(self, split: Split, decoder: Decoder, deterministic: bool) -> "ShardImages":
        """The shards of one split, as the run's index lists them.

        Raises:
            UsageError: Labels are numbers, and higher than those of the training set.
        """
        index = self._index(split)
        copies = None if self.copy_to is None else copy_folder(self.copy_to, self.folders[split])
        reader = ShardReader(self.folders[split], index, copies)
        images = ShardImages(reader, decoder, deterministic, self.image)
        if index.class_names is None and split != "train" and self.folders["train"].is_dir():
            found, images.classes = len(images.classes), self.training_classes()
            if found > len(images.classes):
                raise UsageError(
                    f"data.root: {self.folders[split]} has the label {found - 1}, but the labels of {self.folders['train']} "
                    f"end at {len(images.classes) - 1}; use the labels of the training set."
                )
        return images

    def _index(self, split: Split) -> ShardIndex:
        path = None if self.index_folder is None else self.index_folder / f"{split}.index"
        if path is not None and path.exists():
            return ShardIndex.open(path)
        return check_images(find_index(self.folders[split]), self.folders[split], self.image)


class ShardImages(ImageFiles):
    """The images that ``reader`` reads; ``image`` as in ``Shards``."""

    def __init__(self, reader: ShardReader, decoder: Decoder, deterministic: bool, image: str | None = None) -> None:
        super().__init__(reader.folder, reader.index, decoder, deterministic)
        self.reader = reader
        priorities = {name: _priority(name, image) for name in reader.index.fields}
        self._priorities = {name: priority for name, priority in priorities.items() if priority is not None}

    def place(self, index: int) -> str:
        """Where an image is: shard and member."""
        return self.reader.place(index, self._entry(index))

    def read(self, index: int) -> bytes | Tensor:
        """The content of an image; if it is an array of pixels, as a read-only tensor, uint8 (bytes,)."""
        entry = self._entry(index)
        return self.reader.view(entry) if entry.field.endswith("npy") else self.reader.read(entry)

    def _entry(self, index: int) -> Entry:
        images = (entry for entry in self.reader.index.entries(index) if entry.field in self._priorities)
        return min(images, key=lambda entry: self._priorities[entry.field])


def check_images(index: ShardIndex, folder: Path, image: str | None) -> ShardIndex:
    """Return ``index``; UsageError if a sample has no image, several that could be it, or no label."""
    priorities = [_priority(name, image) for name in index.fields]
    if image is not None and 0 not in priorities:
        raise UsageError(f"data.image: no sample in {folder} has {image}; they have {', '.join(index.fields)}.")
    images = np.zeros(len(index), np.int64)  # how many fields of its highest priority a sample has
    for priority in range(_PRIORITIES):
        fields = [number for number, own in enumerate(priorities) if own == priority]
        images = np.where(images, images, index.count_fields(fields))
    highest = _MAX_CLASSES if index.class_names is None else len(index.class_names)
    for wrong, problem in (
        (images == 0, f"has no {image or 'jpg, jpeg, png or npy'}; for other data, write a DataModule with ShardDataset"),
        (images > 1, "has more than one image; name the field of the one to take with data.image"),
        (index.labels < 0, "has no label: a number or a name in its cls, or as label in its json"),
        (index.labels >= highest, "has a label that is too high for the number of a class"),
    ):
        if wrong.any():
            number = int(np.argmax(wrong))
            shard = index.shards[next(iter(index.entries(number))).shard].name
            raise UsageError(f"data.root: {folder / shard}: sample {index.key(number)!r} {problem}.")
    return index


def _priority(field: str, image: str | None) -> int | None:
    """The priority of a field as the image of its sample, 0 is the highest; None if it cannot be one."""
    if image is not None:
        return 0 if field == image.lower() else None
    before, _, kind = field.rpartition(".")
    if kind in ("jpg", "jpeg", "png"):
        return 1 if before else 0
    return (3 if before else 2) if kind == "npy" else None
