"""Files with the rows that each rank predicts, and the one file that rank zero merges from them.

Rows are written as they are predicted, and merged in blocks: no process ever holds more than a batch or a block of them.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

_BLOCK_BYTES = 2**23
"""Size of a block. Merging opens the files of all ranks once per block."""

TensorType = tuple[torch.dtype, tuple[int, ...]]
"""Type of an output, and its shape without the first dimension."""


class PartWriter:
    """Appends rows to the files of one rank in ``folder``.

    Attributes:
        types: Type of each output; empty before the first rows.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank, self._files = folder, rank, list[BinaryIO]()
        self.types: dict[str, TensorType] = {}

    def append(self, indices: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Add the rows ``tensors``, each (n, …), of the samples ``indices``."""
        if not self._files:
            self._folder.mkdir(exist_ok=True)
            self.types = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()}
            self._files = [_file(self._folder, self._rank, number).open("wb") for number in range(len(tensors) + 1)]
        rows = [np.array(indices, "<i8"), *(_as_bytes(tensors[name]) for name in self.types)]
        for file, content in zip(self._files, rows, strict=True):
            content.tofile(file)

    def close(self) -> None:
        """Close the files and write the types; the part is then complete."""
        for file in self._files:
            file.close()
        if self._files:
            torch.save(self.types, self._folder / f"{self._rank}.pt")

    def discard(self) -> None:
        """Remove the files."""
        for file in self._files:
            file.close()
            Path(file.name).unlink(missing_ok=True)
        if self._files:
            (self._folder / f"{self._rank}.pt").unlink(missing_ok=True)
            with suppress(OSError):  # the last rank removes the folder
                self._folder.rmdir()


@dataclass(frozen=True)
class Part:
    """The rows of one rank. Its files are open only while they are read: a process may have fewer than there are ranks.

    Attributes:
        folder: Folder of all parts.
        rank: The rank.
        types: Type of each output.
    """

    folder: Path
    rank: int
    types: dict[str, TensorType]

    @classmethod
    def open(cls, folder: Path, rank: int) -> "Part":
        """Open the part of ``rank``, whose types it reads."""
        return cls(folder, rank, torch.load(folder / f"{rank}.pt", weights_only=True))

    def indices(self) -> NDArray[np.int64]:
        """Indices of the samples, int64 (n,)."""
        return np.fromfile(_file(self.folder, self.rank, 0), "<i8")

    def rows(self, name: str) -> NDArray[np.uint8]:
        """The bytes of an output, uint8 (n, bytes of a row), mapped into memory; a row must have at least one byte."""
        number = 1 + list(self.types).index(name)
        return np.memmap(_file(self.folder, self.rank, number), np.uint8, "r").reshape(-1, _row_bytes(self.types[name]))


def merge_parts(parts: Sequence[Part], path: Path) -> int:
    """Write the rows of ``parts`` to ``path``, a safetensors file, in the order of their indices; return their number."""
    indices = [part.indices() for part in parts]
    starts = np.cumsum([0, *map(len, indices)])
    order = np.concatenate(indices).argsort(kind="stable")  # 8 bytes a row: only this grows with the data
    total, types = len(order), parts[0].types
    names = sorted(types, key=lambda name: (-types[name][0].itemsize, name))  # as safetensors does, for the alignment
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        kind, shape = types[name]
        begin, end = end, end + total * _row_bytes(types[name])
        header[name] = {"dtype": _type_name(kind), "shape": [total, *shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            if width := _row_bytes(types[name]):
                block = max(1, _BLOCK_BYTES // width)
                for first in range(0, total, block):
                    wanted = order[first : first + block]
                    rows = np.empty((len(wanted), width), np.uint8)
                    owners = np.searchsorted(starts, wanted, "right") - 1
                    for owner in np.unique(owners):
                        here = owners == owner
                        rows[here] = parts[owner].rows(name)[wanted[here] - starts[owner]]
                    file.write(rows.data)
    return total


def _file(folder: Path, rank: int, number: int) -> Path:
    """The file of an output, counted from 1; file 0 has the indices."""
    return folder / f"{rank}-{number}.bin"


def _as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return array


def _row_bytes(kind: TensorType) -> int:
    return kind[0].itemsize * int(np.prod(kind[1], dtype=np.int64))


def _type_name(kind: torch.dtype) -> str:
    """The name of a type in safetensors; KeyError if it does not support the type."""
    content = save({"": torch.empty(0, dtype=kind)})
    name: str = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[""]["dtype"]
    return name
