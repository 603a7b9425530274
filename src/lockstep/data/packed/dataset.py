"""A plain map-style dataset of any fields."""

import io
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchcodec.decoders import decode_image

from lockstep.core import RunError, UsageError, file_error
from lockstep.data.packed.index import Entry
from lockstep.data.packed.pixels import explain
from lockstep.data.packed.reader import ShardReader
from lockstep.data.packed.scan import find_index

_INTEGERS, _TEXTS, _IMAGES = ("cls", "cls2", "index", "id"), ("txt", "text"), ("jpg", "jpeg", "png")


class ShardDataset(Dataset[dict[str, Any]]):
    """The samples of the ``.tar`` files in a folder, in their order, with random access.

    A sample is a dictionary of its fields and ``__key__``. A field is decoded by what its name ends with: ``cls`` to an int,
    ``json``, ``txt`` to a str, ``npy`` to an array, and ``jpg`` and ``png`` to an image, uint8 (3, H, W). Others are bytes.

    Args:
        folder: The folder. Its index is written if it is missing; create the dataset in ``prepare_data`` too, to do this once.
        fields: Names of the fields to read; by default all.
        decode: Decode the fields; else all are bytes.
        transform: Called with each sample.

    Raises:
        UsageError: The folder holds no shard, one is compressed, truncated or damaged, or no sample has one of ``fields``.
    """

    def __init__(
        self,
        folder: str | Path,
        fields: Collection[str] | None = None,
        decode: bool = True,
        transform: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        index = find_index(Path(folder))
        self.reader, self.names, self.decode, self.transform = ShardReader(Path(folder), index), fields, decode, transform
        if missing := sorted(set(fields or ()) - set(index.fields)):
            raise UsageError(f"fields: no sample in {folder} has {', '.join(missing)}; they have {', '.join(index.fields)}.")

    def __len__(self) -> int:
        return len(self.reader.index)

    def __getitem__(self, index: int) -> Any:
        """One sample.

        Raises:
            RunError: A field cannot be read or decoded.
        """
        sample: dict[str, Any] = {"__key__": self.reader.index.key(index)}
        for entry in self.reader.index.entries(index):
            if self.names is None or entry.field in self.names:
                sample[entry.field] = self._read(index, entry)
        return sample if self.transform is None else self.transform(sample)

    def _read(self, index: int, entry: Entry) -> Any:
        try:
            content = self.reader.read(entry)
            return decode_field(entry.field, content) if self.decode else content
        except OSError as error:
            raise file_error(error, f"{self.reader.place(index, entry)} cannot be read ({error.strerror}).") from error
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"{self.reader.place(index, entry)} is damaged ({explain(error)}); set decode=False to get its bytes."
            ) from error


def decode_field(name: str, content: bytes) -> Any:
    """The value of a field, by what its name ends with; see ``ShardDataset``.

    Raises:
        RuntimeError, ValueError: It is damaged.
    """
    kind = name.rpartition(".")[2]
    if kind in _INTEGERS:
        return int(content)
    if kind in _TEXTS:
        return content.decode()
    if kind == "json":
        return json.loads(content)
    if kind in _IMAGES:
        return decode_image(content, mode="RGB")
    if kind == "npy":
        return np.load(io.BytesIO(content), allow_pickle=False)
    return content
