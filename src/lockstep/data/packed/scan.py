"""Index the shards of a folder once: the first process that needs the index writes it beside the shards, if it can."""

import json
import logging
import mmap
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lockstep.core import RunError, UsageError, atomic_write, count, file_error, read_json
from lockstep.data.packed.index import IndexBuilder, ShardFile, ShardIndex
from lockstep.data.packed.tar import COMPRESSED_SUFFIXES, Member, compressed, members

log = logging.getLogger(__name__)

INDEX_FILE, MANIFEST_FILE, WORK_FOLDER = "shards.index", "pack.json", ".pack"
"""Names in a folder of shards: the index; what ``lockstep pack`` knows of its shards, and where it works until it has ended."""

_LOG_SECONDS = 30.0
_MAX_LABEL = 2**31 - 1


def find_index(folder: Path) -> ShardIndex:
    """The index of the shards in ``folder``; created if it is missing or out of date.

    Other processes that need it wait. If the folder cannot be written, the index stays in memory.

    Raises:
        UsageError: The folder holds no shard, its packing has not ended, or a shard is compressed, truncated or damaged.
    """
    path = folder / INDEX_FILE
    if (index := _current_index(path, folder)) is not None:
        return index
    try:
        with locked(folder):
            if (index := _current_index(path, folder)) is not None:
                return index
            content = index_folder(folder)
            try:
                atomic_write(path, lambda temporary: temporary.write_bytes(content))
            except OSError as error:
                log.warning("the index of %s cannot be written there (%s) and stays in memory", folder, error.strerror)
                return ShardIndex(content)
        return ShardIndex.open(path)
    except (OSError, NotImplementedError):  # the folder, or its file system, has no locks
        return ShardIndex(index_folder(folder))


def _current_index(path: Path, folder: Path) -> ShardIndex | None:
    """The index in ``path`` if it matches the shards in ``folder``."""
    shards = list_shards(folder)
    if not path.exists():
        return None
    try:
        index = ShardIndex.open(path)
        index.verify()
    except (RunError, OSError) as error:
        log.warning("%s", error)
        return None
    return index if is_current(index, shards) else None


def is_current(index: ShardIndex, shards: list[ShardFile]) -> bool:
    """Whether ``index`` matches ``shards``."""
    return len(index.shards) == len(shards) and all(
        (own.name, own.size) == (found.name, found.size) and own.changed in (None, found.changed)
        for own, found in zip(index.shards, shards, strict=True)
    )


def list_shards(folder: Path) -> list[ShardFile]:
    """The tar files in ``folder``, sorted by name.

    Raises:
        UsageError: The folder is missing, holds none or a compressed one, or ``lockstep pack`` has not ended.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
        shards = [
            ShardFile(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
            for entry in entries
            if entry.name.endswith(".tar") and entry.is_file()
        ]
    except OSError as error:
        raise file_error(error, f"data.root: {folder} cannot be read ({error.strerror}).", UsageError) from error
    if (folder / WORK_FOLDER).exists():
        raise UsageError(f"data.root: packing of {folder} has not finished; run the same lockstep pack command again.")
    for entry in entries:
        if entry.name.endswith(COMPRESSED_SUFFIXES):
            raise compressed(folder / entry.name, entry.name.rpartition(".")[2])
    if not shards:
        raise UsageError(f"data.root: {folder} holds no .tar file; lockstep pack makes them of folders of images.")
    return shards


def index_folder(folder: Path) -> bytes:
    """The content of the ``ShardIndex`` of all shards in ``folder``; see ``find_index`` for its errors."""
    shards = list_shards(folder)
    packed, classes = _packed(folder)
    sizes = {shard.name: shard.size for shard in shards}
    for name, size in packed.items():  # an incomplete copy would be a smaller data set
        if sizes.get(name) != size:
            problem = "has another size than when it was packed" if name in sizes else "was packed, and is missing"
            raise UsageError(
                f"data.root: {folder / name} {problem}; copy it again. To use the others without it, remove {MANIFEST_FILE}."
            )
    log.info("indexing %s in %s", count(len(shards), "shard"), folder)
    return index_shards(folder, shards, classes)


def index_shards(folder: Path, shards: list[ShardFile], classes: list[str] | None) -> bytes:
    """The content of the ``ShardIndex`` of ``shards``, which are in ``folder``; the header of each member is read.

    Args:
        classes: Names of the classes, if they are known and the labels are numbers.

    Raises:
        UsageError: A shard is compressed, truncated or damaged, or cannot be read.
    """
    builder, labels, next_line = IndexBuilder(), _Labels(), time.monotonic() + _LOG_SECONDS
    for number, shard in enumerate(shards):
        if time.monotonic() > next_line:
            log.info("indexed %d of %d shards in %s", number, len(shards), folder)
            next_line += _LOG_SECONDS
        path = folder / shard.name
        try:
            with path.open("rb") as file:
                if not shard.size:
                    raise UsageError(f"data.root: {path} is empty; make or copy it again.")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    for key, fields in _samples(content, path):
                        builder.add_sample(key, [(name, member.offset, member.size) for name, member in fields.items()])
                        labels.add(content, fields)
        except OSError as error:
            raise file_error(error, f"data.root: {path} cannot be read ({error.strerror}).", UsageError) from error
        builder.end_shard(shard)
    return builder.content(*labels.numbered(classes))


def _packed(folder: Path) -> tuple[dict[str, int], list[str] | None]:
    """Names and sizes of the shards that ``lockstep pack`` has written to ``folder``, and the names of the classes."""
    try:
        manifest = read_json(folder / MANIFEST_FILE)
        return {record["name"]: record["bytes"] for record in manifest.get("shards", [])}, manifest.get("classes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"data.root: {folder / MANIFEST_FILE} is damaged; copy it again, or remove it.") from error


def split_name(name: str) -> tuple[str, str] | None:
    """Split the name of a member at its first dot into key and field, as webdataset does; None for names that it ignores."""
    if re.fullmatch(r"__[^/]*__", name):  # metadata of the whole shard
        return None
    match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", name, re.DOTALL)
    return None if match is None else (match[1], match[2].lower())


def _samples(content: mmap.mmap, shard: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Key and fields of each sample: consecutive members with the same key."""
    key, fields = "", dict[str, Member]()
    for member in members(content, shard):
        parts = split_name(member.name)
        if parts is None:
            continue
        if parts[0] != key:
            if fields:
                yield key, fields
            key, fields = parts[0], {}
        if parts[1] in fields:
            raise UsageError(f"data.root: {shard} has {member.name!r} twice in a row; a sample has one file for each suffix.")
        fields[parts[1]] = member
    if fields:
        yield key, fields


class _Labels:
    """The labels of the samples, from their field ``cls``, or from ``label`` or ``cls`` in their field ``json``."""

    def __init__(self) -> None:
        self._found: list[int | str | None] = []

    def add(self, content: mmap.mmap, fields: dict[str, Member]) -> None:
        """Read the label of one more sample."""
        label: Any = None
        if (member := fields.get("cls")) is not None:
            text = content[member.offset : member.offset + min(member.size, 1000)].decode(errors="replace").strip()
            label = int(text) if re.fullmatch(r"\d+", text, re.ASCII) else text or None
        elif (member := fields.get("json")) is not None:
            try:
                record = json.loads(content[member.offset : member.offset + member.size])
                label = record.get("label", record.get("cls"))
            except (ValueError, AttributeError):
                pass
        known = isinstance(label, str) or (type(label) is int and 0 <= label <= _MAX_LABEL)
        self._found.append(label if known else None)

    def numbered(self, classes: list[str] | None) -> tuple[list[int], list[str] | None]:
        """The number of each sample's class, -1 for none, and the names of the classes.

        The names are ``classes`` if all labels are numbers, else the labels.
        """
        if any(isinstance(label, str) for label in self._found):
            classes = sorted({str(label) for label in self._found if label is not None})
            numbers = {name: number for number, name in enumerate(classes)}
            return [-1 if label is None else numbers[str(label)] for label in self._found], classes
        return [-1 if label is None else int(label) for label in self._found], classes


@contextmanager
def locked(folder: Path, wait_seconds: float | None = None) -> Iterator[None]:
    """Exclude other processes that index ``folder`` or pack into it.

    Args:
        wait_seconds: How long to wait for such a process; None: until it ends.

    Raises:
        UsageError: Another process does that, and has not ended.
        OSError: The folder cannot be written.
        NotImplementedError: Its file system has no locks, and ``wait_seconds`` is None.
    """
    lock = FileLock(folder / f".{INDEX_FILE}.lock")
    try:
        lock.acquire(timeout=wait_seconds or 0)
    except Timeout:
        if wait_seconds is not None:
            raise UsageError(f"{folder}: another process is packing into it or indexing it; wait for it to end.") from None
        log.info("waiting for another process to index %s", folder)
        lock.acquire()
    except NotImplementedError:
        if wait_seconds is None:
            raise
        log.warning("the file system of %s has no locks: do not pack into it twice at the same time", folder)
    try:
        yield
    finally:
        lock.release()
