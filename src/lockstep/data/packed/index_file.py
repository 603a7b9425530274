"""An index in one file, which all processes of a run map into memory: a line of JSON, then arrays."""

import hashlib
import json
import mmap
import os
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from lockstep.core import RunError


class IndexFile:
    """The base of the indexes. The line of JSON is padded to 8 bytes, and holds the checksum of what follows.

    There is no Python object per sample: each worker process would copy its memory when it counts a reference.

    Args:
        content: What ``encode_index`` returns.
        path: The file that holds it, if any.

    Raises:
        RunError: The file is damaged.
    """

    _remedy: str

    def __init__(self, content: bytes | mmap.mmap, path: Path | None = None) -> None:
        self._content, self.path = content, path
        try:
            self._body = content.find(b"\n") + 1
            self._header: dict[str, Any] = json.loads(content[: self._body])
            self._parse()
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error

    def _parse(self) -> None:
        """Set the attributes of the index; ValueError, KeyError or TypeError if it is damaged."""
        raise NotImplementedError

    @classmethod
    def open(cls, path: Path) -> Self:
        """The index in ``path``, mapped into memory."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"", path)

    def __reduce__(self) -> Any:
        return (type(self), (self.content,)) if self.path is None else (type(self).open, (self.path,))

    @property
    def content(self) -> bytes:
        """A copy of the bytes of the index."""
        return bytes(self._content[:])

    def verify(self) -> None:
        """Raise RunError if the content does not have its checksum."""
        if hashlib.sha256(self._content[self._body :]).hexdigest() != self._header.get("sha256"):
            raise self._damaged()

    def _damaged(self) -> RunError:
        return RunError(f"{self.path} is damaged; {self._remedy}.")


def encode_index(header: dict[str, Any], arrays: "Sequence[array[int]]", *rest: bytes | bytearray) -> bytes:
    """The content of an ``IndexFile``: ``header``, ``arrays`` in little-endian order, and ``rest``."""
    if sys.byteorder == "big":
        for part in arrays:
            part.byteswap()
    body = b"".join((*arrays, *rest))
    line = json.dumps({**header, "sha256": hashlib.sha256(body).hexdigest()}).encode()
    return line + b" " * (-(len(line) + 1) % 8) + b"\n" + body
