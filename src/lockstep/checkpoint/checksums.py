"""Checksums of each piece of the files of a checkpoint, so that all ranks share their verification.

A file is described by its size and the SHA-256 of each piece of it. The work to verify a checkpoint is divided by pieces: each
rank reads an equal share of all bytes, however they are spread over files, and however many ranks have written them.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import torch

PIECE_BYTES = 64 * 2**20
"""Bytes of a piece; the last one of a file has fewer."""

_BLOCK_BYTES = 2**20

FileSums = tuple[int, str]
"""Size of a file in bytes, and the SHA-256 of each of its pieces, as concatenated hexadecimal digits.

An empty file has one piece, so that it is verified too.
"""

_DIGITS = 2 * hashlib.sha256().digest_size

Piece = tuple[str, int, int, str]
"""A piece to verify: name of the file, size of the file, number of the piece, and its SHA-256."""


def write_file(path: Path, content: Any) -> FileSums:
    """Write ``content`` with ``torch.save``, flush it to disk, and return its checksums, computed in memory."""
    with _HashingWriter(FileIO(path, "w")) as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # verification must read the disk, not the page cache
        return file.tell(), file.sums()


def check_sums(name: str, file: FileSums) -> None:
    """Check that each piece of the file ``name`` has a checksum; what lacks one would not be verified.

    Raises:
        ValueError: The number of checksums is wrong.
    """
    size, sums = file
    needed = max(1, -(-size // PIECE_BYTES))
    if len(sums) != needed * _DIGITS:
        raise ValueError(
            f"{name} of {size} bytes needs {needed * _DIGITS} digits of checksums instead of {len(sums)}: they are damaged or "
            "of another format"
        )


def share_pieces(files: Mapping[str, FileSums], shares: int) -> list[list[Piece]]:
    """Divide the pieces of ``files`` into ``shares`` of about the same number of bytes, in the order of ``files``."""
    total, end = sum(size for size, _ in files.values()), 0
    divided: list[list[Piece]] = [[] for _ in range(shares)]
    for name, (size, sums) in files.items():
        for number in range(len(sums) // _DIGITS):
            length = min(PIECE_BYTES, size - number * PIECE_BYTES)
            middle = end + length // 2
            divided[min(middle * shares // max(total, 1), shares - 1)].append(
                (name, size, number, sums[number * _DIGITS :][:_DIGITS])
            )
            end += length
    return divided


def verify_pieces(folder: Path, pieces: Sequence[Piece]) -> None:
    """Read ``pieces`` of the files in ``folder``.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file has another size or content than its checksums say.
    """
    block = memoryview(bytearray(_BLOCK_BYTES))
    for name, size, number, digest in pieces:
        with (folder / name).open("rb", buffering=0) as file:
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise ValueError(f"{name} has {found} bytes instead of {size}")
            file.seek(number * PIECE_BYTES)
            left, sha256 = min(PIECE_BYTES, size - number * PIECE_BYTES), hashlib.sha256()
            while left > 0 and (count := file.readinto(block[:left])):
                sha256.update(block[:count])
                left -= count
        if sha256.hexdigest() != digest:
            raise ValueError(f"{name} has a checksum mismatch")


class _HashingWriter(BufferedWriter):
    """A file whose checksums are computed while it is written."""

    def __init__(self, file: FileIO) -> None:
        super().__init__(file)
        self._sums = ""
        self._sha256, self._left = hashlib.sha256(), PIECE_BYTES

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while len(rest):
            self._sha256.update(part := rest[: self._left])
            rest = rest[len(part) :]
            self._left -= len(part)
            if not self._left:
                self._sums += self._sha256.hexdigest()
                self._sha256, self._left = hashlib.sha256(), PIECE_BYTES
        return super().write(data)

    def sums(self) -> str:
        """The SHA-256 of each piece that was written."""
        return self._sums + (self._sha256.hexdigest() if self._left < PIECE_BYTES or not self._sums else "")
