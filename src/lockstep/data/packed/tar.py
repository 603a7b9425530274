"""The members of a tar file, from its headers alone: ustar, GNU and pax, as tar, tarfile and webdataset write them."""

import re
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

from lockstep.core import UsageError

BLOCK = 512
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_REGULAR, _LINKS, _WITHOUT_DATA, _EXTENSIONS = b"0\x007", b"12", b"123456", b"LKxg"


class Member(NamedTuple):
    """A regular file in a tar file.

    Attributes:
        name: Its name; bytes that are not UTF-8 as in a file name of Python.
        offset: Start of its content, in bytes.
        size: Length of its content in bytes.
    """

    name: str
    offset: int
    size: int


def members(content: bytes | mmap, shard: Path) -> Iterator[Member]:
    """The regular files in a tar file, in their order; only the pages with their headers are read.

    Raises:
        UsageError: It is compressed, truncated or damaged, or has a link or a sparse file.
    """
    for magic, name in _COMPRESSIONS.items():
        if content[: len(magic)] == magic:
            raise compressed(shard, name)
    position, previous, size = 0, "its beginning", len(content)
    extended: dict[str, str] = {}
    while True:
        header = content[position : position + BLOCK]
        if len(header) < BLOCK:
            raise UsageError(f"data.root: {shard} is truncated: it ends after {previous}, without the end mark of a tar file.")
        if header.count(0) == BLOCK:
            return _check_rest(content, position, shard)
        data = position + BLOCK
        try:
            if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
                raise ValueError("checksum")
            kind = header[156:157]
            is_extension = kind in _EXTENSIONS
            length, name = _number(header[124:136]), _name(header)
            if not is_extension:
                length, name = int(extended.get("size", length)), extended.get("path", name)
            if length < 0:  # this loop would go backwards, and might never end
                raise ValueError("size")
        except ValueError:
            raise UsageError(
                f"data.root: {shard} is damaged, or not a tar file: no header after {previous}, at byte {position:,}; "
                "make or copy it again."
            ) from None
        if kind in _WITHOUT_DATA:
            length = 0
        if data + length > size:
            raise UsageError(
                f"data.root: {shard} is truncated in {name!r}, which has {length:,} bytes, of which {size - data:,} are there; "
                "make or copy it again."
            )
        if kind == b"L":
            extended["path"] = _text(content[data : data + length].rstrip(b"\0"))
        elif kind == b"x":
            extended |= _pax(content[data : data + length])
        elif any(key.startswith("GNU.sparse") for key in extended):
            kind = b"S"
        if kind in _LINKS or kind == b"S":
            what = "a sparse file" if kind == b"S" else "a link"
            raise UsageError(
                f"data.root: {shard}: {name!r} is {what}, without its content; use tar --dereference --hard-dereference."
            )
        if kind in _REGULAR:
            yield Member(name, data, length)
        if not is_extension:
            extended, previous = {}, repr(name)
        position = data + length + -length % BLOCK


def compressed(shard: Path, how: str) -> UsageError:
    """The error about a compressed shard."""
    return UsageError(
        f"data.root: {shard} is compressed ({how}), which prevents random access; decompress it: the images in it are "
        "compressed already."
    )


def _check_rest(content: bytes | mmap, position: int, shard: Path) -> None:
    """Raise UsageError if something follows the end mark at ``position``."""
    for start in range(position, len(content), 1 << 20):
        if content[start : start + (1 << 20)].strip(b"\0"):
            raise UsageError(
                f"data.root: {shard} has more after the end mark at byte {position:,}; join tar files with tar -A."
            )


def _number(field: bytes) -> int:
    """A number in octal digits, or, if it begins with the bit 0x80, in base 256."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""  # GNU has times there
    return _text(prefix + b"/" + name if prefix else name)


def _pax(records: bytes) -> dict[str, str]:
    """The records of a pax header: ``LENGTH KEY=VALUE``, each with a newline."""
    found: dict[str, str] = {}
    while match := re.match(rb"(\d+) ([^=]+)=", records):
        length = int(match[1])
        found[_text(match[2])] = _text(records[match.end() : length - 1])
        records = records[max(length, 1) :]
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
