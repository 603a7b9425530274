"""Private names of torch's extension builder: its lock file, which a killed process leaves behind."""

import fcntl
import logging
import os
import time
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from lockstep.compat import patch, private_imports

with private_imports("torch"):
    from torch.utils.file_baton import FileBaton

log = logging.getLogger(__name__)

_MARK = "lockstep"
"""Content of the lock file of a build, which the building process locks in the kernel as long as it lives."""

_UNMARKED_SECONDS = 1800.0
"""Age after which a lock file without the mark counts as left behind: nothing tells whether its process lives."""


@cache
def recover_build_locks() -> None:
    """Let the build of an op replace the lock file of a process that was killed while it built.

    torch's ``FileBaton`` waits for ever until that process removes the file.
    """
    acquire, release = FileBaton.try_acquire, FileBaton.release

    def try_acquire(baton: Any) -> bool:
        path = Path(baton.lock_file_path)
        baton.lockstep_file = _mark(path.open("r+")) if acquire(baton) else _wait_or_take_over(path, baton.wait_seconds)
        return baton.lockstep_file is not None

    def release_both(baton: Any) -> None:
        release(baton)
        baton.lockstep_file.close()

    patch("torch", FileBaton, "try_acquire", try_acquire)
    patch("torch", FileBaton, "release", release_both)


def _wait_or_take_over(path: Path, seconds: float) -> TextIO | None:
    """Wait until the other process has built the op, which removes its lock file; if it was killed, return that file."""
    while path.exists():
        try:
            file = path.open("r+")
            is_free, found = _lock(file), os.fstat(file.fileno())
            is_old = is_free is not False and time.time() - found.st_mtime > _UNMARKED_SECONDS
            is_left = is_free if file.read() == _MARK else is_old
            if is_left and path.exists() and os.path.samestat(found, path.stat()):
                log.warning("%s was left by a build that was killed; the op is built again", path)
                return _mark(file)
            file.close()
        except FileNotFoundError:
            return None
        time.sleep(seconds)
    return None


def _mark(file: TextIO) -> TextIO:
    """Make this process the one that builds, as far as the file system has locks."""
    file.truncate(0)
    if _lock(file):
        file.seek(0)
        file.write(_MARK)
        file.flush()
    return file


def _lock(file: TextIO) -> bool | None:
    """Lock a file in the kernel; False if another process has, None where the file system has no such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
