"""Read the fields of a sample from the shards, in any order."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lockstep.data.packed.index import Entry, ShardIndex
from lockstep.data.packed.local_copy import is_copy
from lockstep.data.packed.mapping import MappedFile

log = logging.getLogger(__name__)

Content = TypeVar("Content", bytes, Tensor)

_LOOK_SECONDS = 10.0
"""Time between two checks for the copy of a shard."""


class ShardReader:
    """The fields of the samples of ``index``, whose shards are in ``folder``. A process maps a shard when it first needs it.

    Args:
        copies: Folder of copies of the shards on this node; a copy is read instead of its shard as soon as it is complete.
    """

    def __init__(self, folder: Path, index: ShardIndex, copies: Path | None = None) -> None:
        self.folder, self.index, self.copies = folder, index, copies
        self._maps: dict[int, MappedFile] = {}
        self._copied: set[int] = set()  # shards of which the copy is mapped
        self._next_look: dict[int, float] = {}

    def __reduce__(self) -> Any:
        return (ShardReader, (self.folder, self.index, self.copies))

    def read(self, entry: Entry) -> bytes:
        """The content of one field.

        Raises:
            OSError: The shard is gone, cannot be read, or has another size than it had.
        """
        return self._take(entry, MappedFile.read)

    def view(self, entry: Entry) -> Tensor:
        """The content of one field, uint8 (length,), in memory that cannot be written; errors as of ``read``."""
        return self._take(entry, MappedFile.view)

    def _take(self, entry: Entry, take: Callable[[MappedFile, int, int], Content]) -> Content:
        """The result of ``take`` for one field in the copy of its shard, or in the original if the copy fails."""
        try:
            return take(self._map(entry.shard), entry.offset, entry.length)
        except OSError as error:
            if self.copies is None or entry.shard not in self._copied:
                raise
            copy = self.copies / self._name(entry.shard)
            log.warning("%s cannot be read (%s); reading its original instead", copy, error.strerror)
            self._copied.remove(entry.shard)
            shard = self._maps[entry.shard] = self._open(self.folder, entry.shard)
            return take(shard, entry.offset, entry.length)

    def _map(self, number: int) -> MappedFile:
        shard = self._maps.get(number)
        if self.copies is not None and time.monotonic() >= self._next_look.get(number, 0.0):
            is_copied = is_copy(self.copies / self._name(number), self.folder / self._name(number))
            self._next_look[number] = math.inf if is_copied else time.monotonic() + _LOOK_SECONDS
            if is_copied:
                self._copied.add(number)
                shard = self._maps[number] = self._open(self.copies, number)
        if shard is None:
            shard = self._maps[number] = self._open(self.folder, number)
        return shard

    def _open(self, folder: Path, number: int) -> MappedFile:
        name, size, _ = self.index.shards[number]
        return MappedFile(folder / name, size)

    def _name(self, number: int) -> str:
        return self.index.shards[number].name

    def place(self, index: int, entry: Entry) -> str:
        """Where a field is, for messages: shard and member."""
        return f"{self.folder / self._name(entry.shard)}: {self.index.key(index)}.{entry.field}"
