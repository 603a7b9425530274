"""Read-only memory maps of files, which keep no file open: a data set may have more shards than a process may open files."""

import ctypes
import errno
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WILL_NEED, _DONT_NEED, _POPULATE_READ = 3, 4, 22  # advice to madvise(2) on Linux; the last one since 5.14


class MappedFile:
    """The content of a file, which processes share through the page cache.

    Each read releases the pages of the read before, so that the resident memory of the process does not grow.

    Args:
        path: The file.
        size: Its expected size in bytes.

    Raises:
        OSError: The file cannot be opened or mapped, or has another size.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._libc = _libc()
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(handle).st_size
            if found != size:  # a page behind the end of the file would end the process with SIGBUS
                raise OSError(errno.EIO, f"it has {found:,} bytes, and had {size:,} when its index was made")
            self._start = self._libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
        finally:
            os.close(handle)
        if self._start in (None, ctypes.c_void_p(-1).value):
            raise OSError(number := ctypes.get_errno(), os.strerror(number))
        memory = (ctypes.c_ubyte * size).from_address(self._start)
        weakref.finalize(memory, self._libc.munmap, self._start, size).atexit = False
        self._content = torch.frombuffer(memory, dtype=torch.uint8)  # this tensor and its views keep the file mapped
        self._newest = (self._start, 0)

    def read(self, offset: int, length: int) -> bytes:
        """A copy of ``length`` bytes from ``offset``; OSError if the disk fails or the file was truncated."""
        self._populate(offset, length)
        return ctypes.string_at(self._start + offset, length)

    def view(self, offset: int, length: int) -> Tensor:
        """``length`` bytes from ``offset``, uint8 (length,), without a copy; a write to it crashes the process.

        OSError if the disk fails or the file was truncated.
        """
        self._populate(offset, length)
        return self._content[offset : offset + length]

    def _populate(self, offset: int, length: int) -> None:
        """Release the pages of the last read, and read exactly those of the next one, if Linux can say whether that worked."""
        self._libc.madvise(*self._newest, _DONT_NEED)
        before = offset % mmap.PAGESIZE
        self._newest = self._start + offset - before, length + before
        self._libc.madvise(*self._newest, _WILL_NEED)
        if self._libc.madvise(*self._newest, _POPULATE_READ) and (number := ctypes.get_errno()) != errno.EINVAL:
            raise OSError(errno.EIO, f"its disk fails, or it was truncated ({os.strerror(number)})")


def _libc() -> Any:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
