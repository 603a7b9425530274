"""Read-only memory maps of files, which keep no file open: a data set may have more shards than a process may open files."""

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

_WILL_NEED, _DONT_NEED = 3, 4  # advice to madvise(2), on Linux


class MappedFile:
    """The content of a file that other processes share through the page cache.

    What was read leaves the memory of this process again, so that its size does not grow with what it reads.

    Args:
        path: The file.
        size: Its size in bytes, which must be the one that it has.

    Raises:
        OSError: It cannot be opened or mapped, or has another size.
    """

    def __init__(self, path: Path, size: int) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(handle).st_size
            if found != size:  # a page behind the end of the file would end the process with SIGBUS
                raise OSError(0, f"it has {found:,} bytes, and had {size:,} when its index was made")
            self._libc: Any = ctypes.CDLL(None, use_errno=True)
            self._libc.mmap.restype = ctypes.c_void_p
            self._libc.mmap.argtypes = (
                *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
                *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
            )
            self._libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
            self._start = self._libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
        finally:
            os.close(handle)
        if self._start in (None, ctypes.c_void_p(-1).value):
            raise OSError(number := ctypes.get_errno(), os.strerror(number))
        weakref.finalize(self, self._libc.munmap, self._start, size).atexit = False

    def read(self, offset: int, length: int) -> bytes:
        """A copy of ``length`` bytes from ``offset``."""
        first = offset - offset % mmap.PAGESIZE
        self._libc.madvise(self._start + first, offset + length - first, _WILL_NEED)  # one request, of these bytes alone
        content = ctypes.string_at(self._start + offset, length)
        self._libc.madvise(self._start + first, offset + length - first, _DONT_NEED)
        return content
