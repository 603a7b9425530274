"""Read the fields of a sample from the shards, in any order."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lockstep.data.packed.index import Entry, ShardIndex
from lockstep.data.packed.mapping import MappedFile


class ShardReader:
    """The fields of the samples of ``index``, whose shards are in ``folder``. A process maps a shard when it first needs it."""

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        self.folder, self.index = folder, index
        self._maps: dict[int, MappedFile] = {}

    def __reduce__(self) -> Any:
        return (ShardReader, (self.folder, self.index))

    def read(self, entry: Entry) -> bytes:
        """The content of one field.

        Raises:
            OSError: The shard is gone, cannot be read, or has another size than it had.
        """
        return self._map(entry.shard).read(entry.offset, entry.length)

    def view(self, entry: Entry) -> Tensor:
        """The content of one field, uint8 (length,), in memory that cannot be written; errors as of ``read``."""
        return self._map(entry.shard).view(entry.offset, entry.length)

    def _map(self, number: int) -> MappedFile:
        shard = self._maps.get(number)
        if shard is None:
            name, size, _ = self.index.shards[number]
            shard = self._maps[number] = MappedFile(self.folder / name, size)
        return shard

    def fields(self, index: int) -> dict[str, bytes]:
        """The content of all fields of a sample, by their names."""
        return {entry.field: self.read(entry) for entry in self.index.entries(index)}

    def place(self, index: int, entry: Entry) -> str:
        """Where a field is, for messages: shard and member."""
        return f"{self.folder / self.index.shards[entry.shard].name}: {self.index.key(index)}.{entry.field}"
