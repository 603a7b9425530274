"""The index of the shards of one folder: one compact file that all processes map into memory."""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lockstep.data.packed.index_file import IndexFile, encode_index

_FORMAT = 1


class ShardFile(NamedTuple):
    """One tar file.

    Attributes:
        name: Its name in the folder.
        size: Its size in bytes.
        changed: Its modification time in nanoseconds; None if only its size is compared.
    """

    name: str
    size: int
    changed: int | None


class Entry(NamedTuple):
    """Where one field of a sample is.

    Attributes:
        field: What follows the key in the name of the member, in lower case, such as ``jpg``.
        shard: Number of the shard.
        offset: Where its content begins in the shard, in bytes.
        length: In bytes.
    """

    field: str
    shard: int
    offset: int
    length: int


class ShardIndex(IndexFile):
    """Keys, fields and labels of the samples in the shards of a folder, in the order of the shards.

    After the header come arrays: for each shard, key and sample where the next begins, int64 (shards + 1,), (n + 1,) and
    (n + 1,), from 0; of all fields, offsets and lengths, int64 (m,) and (m,); labels, int32 (n,); numbers of the fields,
    int32 (m,); the keys.

    Attributes:
        shards: The tar files.
        labels: Label of each sample, int32 (n,); -1 where it has none.
        fields: Names of all fields.
        class_names: Names of the classes; None where labels are numbers.
    """

    _remedy = "remove it to create it again from the shards"

    def _parse(self) -> None:
        if self._header["format"] != _FORMAT:
            raise ValueError("another format")
        self.shards = [ShardFile(*shard) for shard in self._header["shards"]]
        self.fields: list[str] = self._header["fields"]
        self.class_names: list[str] | None = self._header["classes"]
        samples, entries = self._header["samples"], self._header["entries"]
        lengths = (len(self.shards) + 1, samples + 1, samples + 1, entries, entries, samples, entries)
        place, arrays = self._body, []
        for kind, length in zip(["<i8"] * 5 + ["<i4"] * 2, lengths, strict=True):
            arrays.append(np.frombuffer(self._content, kind, length, place))
            place += arrays[-1].nbytes
        self._shard_ends, self._key_ends, self._entry_ends, self._offsets, self._lengths, self.labels, self._names = arrays
        self._keys = place
        if len(self._content) != place + int(self._key_ends[-1]):
            raise ValueError("a part is missing")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> list[str]:
        """Names of the classes; if labels are numbers, all numbers up to the highest label."""
        if self.class_names is not None:
            return self.class_names
        return [str(label) for label in range(int(self.labels.max(initial=-1)) + 1)]

    def key(self, index: int) -> str:
        """The key of a sample: the name of its members up to the first dot."""
        index = self._position(index)
        place = self._content[self._keys + int(self._key_ends[index]) : self._keys + int(self._key_ends[index + 1])]
        return os.fsdecode(place)

    def entries(self, index: int) -> Iterator[Entry]:
        """The fields of a sample."""
        index = self._position(index)
        shard = int(np.searchsorted(self._shard_ends, index, "right")) - 1
        for number in range(int(self._entry_ends[index]), int(self._entry_ends[index + 1])):
            name = self.fields[self._names[number]]
            yield Entry(name, shard, int(self._offsets[number]), int(self._lengths[number]))

    def count_fields(self, fields: Sequence[int]) -> Any:
        """How many of ``fields``, given by their numbers, each sample has, int64 (n,)."""
        before = np.concatenate([[0], np.cumsum(np.isin(self._names, fields))])
        return np.diff(before[self._entry_ends])

    def _position(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return index % len(self)

    def samples_of(self, shard: int) -> tuple[Any, ...]:
        """Keys, fields and labels of the samples of one shard, for comparison."""
        first, last = (int(self._shard_ends[shard + number]) for number in (0, 1))
        start, end = int(self._entry_ends[first]), int(self._entry_ends[last])
        names = [self.fields[name] for name in self._names[start:end]]
        keys = self._content[self._keys + int(self._key_ends[first]) : self._keys + int(self._key_ends[last])]
        arrays = (self._offsets[start:end], self._lengths[start:end], self.labels[first:last])
        return keys, names, *(part.tobytes() for part in arrays)


@dataclass
class IndexBuilder:
    """Collects shards and samples, in order."""

    shards: list[ShardFile] = field(default_factory=list)
    fields: dict[str, int] = field(default_factory=dict)
    keys: bytearray = field(default_factory=bytearray)
    shard_ends: "array[int]" = field(default_factory=lambda: array("q", [0]))
    key_ends: "array[int]" = field(default_factory=lambda: array("q", [0]))
    entry_ends: "array[int]" = field(default_factory=lambda: array("q", [0]))
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    names: "array[int]" = field(default_factory=lambda: array("i"))

    def add_sample(self, key: str, entries: Iterable[tuple[str, int, int]]) -> None:
        """Add a sample of the current shard: its key, and name, offset and length of each field."""
        self.keys += os.fsencode(key)
        self.key_ends.append(len(self.keys))
        for name, offset, length in entries:
            self.names.append(self.fields.setdefault(name, len(self.fields)))
            self.offsets.append(offset)
            self.lengths.append(length)
        self.entry_ends.append(len(self.offsets))

    def end_shard(self, shard: ShardFile) -> None:
        """Assign the samples since the last call to ``shard``."""
        self.shards.append(shard)
        self.shard_ends.append(len(self.key_ends) - 1)

    def content(self, labels: Sequence[int], classes: list[str] | None) -> bytes:
        """The content of a ``ShardIndex``.

        Args:
            labels: Label of each sample; -1 where it has none.
            classes: Names of the classes; None where labels are numbers.
        """
        arrays = (self.shard_ends, self.key_ends, self.entry_ends, self.offsets, self.lengths, array("i", labels), self.names)
        header = {"format": _FORMAT, "samples": len(labels), "entries": len(self.offsets), "fields": list(self.fields)}
        return encode_index({**header, "classes": classes, "shards": self.shards}, arrays, self.keys)
