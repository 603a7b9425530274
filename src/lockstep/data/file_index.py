"""The files of an image folder: found by one walk, kept in one compact file that all processes of a run map into memory."""

import errno
import json
import os
import secrets
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lockstep.core import LockstepError, UsageError, file_error, fsync
from lockstep.data.packed import IndexFile, encode_index

_SUFFIXES = (".jpg", ".jpeg", ".png")
_RACY_NS = 2 * 10**9  # a folder that changed this shortly before may change again with the same modification time


class FileIndex(IndexFile):
    """Names and labels of the files of one split, in one subfolder for each class; labels follow the order of the classes.

    After the header come the ends of the names, int64 (n + 1,), from 0; labels, int32 (n,); the names, relative to the folder
    of the split; and as JSON what ``is_current`` compares.

    Attributes:
        classes: Names of the classes.
        labels: Label of each file, int32 (n,).
    """

    _remedy = "if no file was added or removed since the run began, remove it, and resume"

    def _parse(self) -> None:
        self.classes: list[str] = self._header["classes"]
        files = self._header["files"]
        self._ends = np.frombuffer(self._content, "<i8", files + 1, self._body)
        self.labels = np.frombuffer(self._content, "<i4", files, self._body + self._ends.nbytes)
        self._names = self._body + self._ends.nbytes + self.labels.nbytes
        self._folders = self._names + int(self._ends[-1])
        if len(self._content) != self._folders + self._header["folders"]:
            raise ValueError("a part is missing")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[str, int]:
        """Name of a file, relative to the folder of the split, and its label."""
        label = int(self.labels[index])
        index %= len(self)
        name = self._content[self._names + int(self._ends[index]) : self._names + int(self._ends[index + 1])]
        return os.fsdecode(name), label

    def is_current(self, folder: Path) -> bool:
        """Whether ``folder`` is the one that was scanned, and no file in it was added or removed since."""
        scanned = json.loads(self._content[self._folders :])
        try:
            return scanned["root"] == os.path.realpath(folder) and all(
                os.stat(os.path.join(folder, name)).st_mtime_ns == changed for name, changed in scanned["changed"].items()
            )
        except OSError:  # a folder is gone
            return False

    def difference(self, other: "FileIndex") -> tuple[list[str], list[str]]:
        """Names that only this index has, and those that only ``other`` has."""
        own, others = ({index[number][0] for number in range(len(index))} for index in (self, other))
        return sorted(own - others), sorted(others - own)


def publish_index(content: bytes, path: Path, replace: bool) -> None:
    """Write an index atomically; without ``replace``, an existing one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # several nodes may write
    try:
        temporary.write_bytes(content)
        fsync(temporary)
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)


def scan(folder: Path) -> bytes:
    """The content of the ``FileIndex`` of ``folder``; see ``list_images`` for its errors."""
    found = list_images(folder)
    return index_content(found.files, found.classes, folder, found.changed)


@dataclass(frozen=True)
class FoundImages:
    """What is in a folder of class folders; names are relative to it.

    Attributes:
        files: Names and labels of the images, in order.
        classes: Names of the classes.
        others: Names of the files that are not images, or in no class; hidden ones do not count.
        changed: See ``index_content``.
    """

    files: list[tuple[str, int]]
    classes: list[str]
    others: list[str]
    changed: Mapping[str, int]


def list_images(folder: Path) -> FoundImages:
    """Find the images in ``folder``.

    Raises:
        UsageError: The folder is missing or cannot be read, has no classes, or a class has no image.
    """
    try:
        return _find_images(folder)
    except OSError as error:
        raise _unreadable(error.filename or folder, error) from error


def _find_images(folder: Path) -> FoundImages:
    walk = _Walk(folder)
    classes = class_names(folder) if folder.is_dir() else []
    if not classes:
        problem = "has no subfolder" if folder.exists() else "does not exist"
        raise UsageError(f"data.root: {folder} {problem}; it must hold one subfolder of images for each class.")
    files: list[tuple[str, int]] = []
    above = _with_parents(folder)
    for label, name in enumerate(classes):
        images = sorted(walk.images(name, above | _with_parents(folder / name)))
        if not images:
            raise UsageError(f"data.root: class folder {printable(folder / name)} holds no {', '.join(_SUFFIXES)} file.")
        files += [(image, label) for image in images]
    loose = [entry.name for entry in _visible(folder) if not entry.is_dir()]
    return FoundImages(files, classes, sorted([*loose, *walk.others]), walk.changed)


def _unreadable(path: str | Path, error: OSError) -> LockstepError:
    return file_error(error, f"data.root: {printable(path)} cannot be read ({error.strerror}).", UsageError)


def index_content(files: Iterable[tuple[str, int]], classes: list[str], folder: Path, changed: Mapping[str, int]) -> bytes:
    """The content of a ``FileIndex``.

    Args:
        files: Names and labels, in order.
        classes: Names of the classes.
        folder: The folder that was scanned.
        changed: Modification time of each folder in it, in nanoseconds; -1 if a later change may have the same time.
    """
    ends, labels, names = array("q", [0]), array("i"), bytearray()
    for name, label in files:
        names += os.fsencode(name)
        ends.append(len(names))
        labels.append(label)
    folders = json.dumps({"root": os.path.realpath(folder), "changed": changed}).encode()
    header = {"files": len(labels), "folders": len(folders), "classes": classes}
    return encode_index(header, (ends, labels), names, folders)


class _Walk:
    """One walk through ``folder``.

    Attributes:
        changed: See ``index_content``.
        others: Files that are not images.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._racy = folder, time.time_ns() - _RACY_NS
        self.changed: dict[str, int] = {}
        self.others: list[str] = []
        if folder.is_dir():
            self._note(".")

    def images(self, inner: str, above: Set[tuple[int, int]]) -> Iterator[str]:
        """The image files in ``inner`` and its subfolders, without hidden ones; ``above``: ``inner`` and what contains it."""
        self._note(inner)
        for entry in _visible(os.path.join(self._folder, inner)):  # Path.rglob takes ten times as long for a million files
            name = os.path.join(inner, entry.name)
            if not entry.is_dir():
                if entry.name.lower().endswith(_SUFFIXES):
                    yield name
                else:
                    self.others.append(name)
            elif _identity(entry.stat()) not in above:  # else a loop of links
                yield from self.images(name, above | {_identity(entry.stat())})

    def _note(self, inner: str) -> None:
        changed = os.stat(os.path.join(self._folder, inner)).st_mtime_ns
        self.changed[inner] = changed if changed < self._racy else -1


def class_names(folder: Path) -> list[str]:
    """The subfolders of ``folder`` that are not hidden, sorted; the index of a name is its label.

    A link to the folder itself or to a folder that contains it is not a class.
    """
    above = _with_parents(folder)
    return sorted(entry.name for entry in _visible(folder) if entry.is_dir() and _identity(entry.stat()) not in above)


def _visible(folder: str | Path) -> "list[os.DirEntry[str]]":
    """Entries of ``folder``, without hidden ones and links to themselves."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".") and not _is_loop(entry)]
    except OSError as error:
        raise _unreadable(folder, error) from error


def _is_loop(entry: "os.DirEntry[str]") -> bool:
    try:
        entry.is_dir()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _with_parents(folder: Path) -> Set[tuple[int, int]]:
    """The identities of ``folder`` and of all folders that contain it."""
    return {_identity(place.stat()) for place in (folder.resolve(), *folder.resolve().parents)}


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def printable(path: str | Path) -> str:
    """``path`` for messages and logs, with the bytes of a name that is not UTF-8 as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")
