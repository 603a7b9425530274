"""Write one shard, and check one that is written."""

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lockstep.core import RunError, atomic_write_json, fsync, read_json
from lockstep.data.packed import WORK_FOLDER
from lockstep.pack.images import ImageOptions
from lockstep.pack.sources import LeftOut, Source


@dataclass(frozen=True)
class ShardRecord:
    """Description of a finished shard.

    Attributes:
        name: Its name in the folder.
        bytes: Its size.
        sha256: Checksum of its bytes.
        samples: Number of its samples.
        left_out: Names of samples that it lacks, and why.
    """

    name: str
    bytes: int
    sha256: str
    samples: int
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, content: Any) -> "ShardRecord | None":
        """The record in ``content``; None if it is something else."""
        try:
            record = cls(**content)
            return cls(**(content | {"left_out": [(name, reason) for name, reason in record.left_out]}))
        except (TypeError, ValueError):
            return None


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shards of ``folder``: each has ``shard_size`` consecutive samples of ``source``, except those left out."""

    source: Source
    folder: Path
    options: ImageOptions
    shard_size: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.source) // self.shard_size)

    def name(self, number: int) -> str:
        """The name of a shard."""
        return f"{number:06d}.tar"

    def find(self, number: int) -> ShardRecord | None:
        """The record of a shard that an interrupted packing has written, if there is one."""
        try:
            return ShardRecord.read(read_json(self._record(number)))
        except (OSError, ValueError):
            return None

    def _record(self, number: int) -> Path:
        return self.folder / WORK_FOLDER / f"{number:06d}.json"

    def samples_of(self, number: int) -> range:
        """Indices of the samples of a shard, including those that are left out."""
        return range(number * self.shard_size, min(len(self.source), (number + 1) * self.shard_size))

    def is_intact(self, record: ShardRecord) -> bool:
        """Whether a shard exists and its size and checksum match."""
        path = self.folder / record.name
        try:
            if path.stat().st_size != record.bytes:
                return False
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
        except OSError:
            return False

    def write(self, number: int, packed: Callable[[int], None]) -> ShardRecord:
        """Write a shard, atomically: the same bytes at each call.

        Args:
            packed: Called after each sample, with the bytes that it takes.

        Raises:
            RunError: No sample of the shard could be packed.
            OSError: It cannot be written.
        """
        partial, left_out, samples = self.folder / WORK_FOLDER / self.name(number), list[tuple[str, str]](), 0
        with partial.open("wb") as raw:
            file = _HashingFile(raw)
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
                for index in self.samples_of(number):
                    size = 0
                    try:
                        fields = self.source.fields(index, self.options)
                        for name, content in fields.items():
                            member = tarfile.TarInfo(f"{index:0{self._digits}d}.{name}")
                            member.size, member.mode = len(content), 0o444
                            tar.addfile(member, io.BytesIO(content))
                            size += len(content)
                        samples += 1
                    except LeftOut as error:
                        left_out.append((error.name, error.reason))
                    packed(size)
        if left_out and not samples:
            name, reason = left_out[0]
            raise RunError(f"None of {len(left_out):,} samples can be packed; the first, {name}: {reason}.")
        fsync(partial)
        record = ShardRecord(self.name(number), file.size, file.digest.hexdigest(), samples, left_out)
        atomic_write_json(self._record(number), asdict(record))
        partial.replace(self.folder / record.name)
        fsync(self.folder)
        return record

    @property
    def _digits(self) -> int:
        return max(6, len(str(len(self.source) - 1)))


class _HashingFile:
    """A file to write to that computes the checksum and the size of its content."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self.size
