"""Private names of torch's extension builder: its lock file, which remains when the building process is killed."""

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
"""Content of the lock file of a build. The building process also holds a kernel lock on the file while it lives."""

_UNMARKED_SECONDS = 1800.0
"""Age after which a lock file without the mark counts as abandoned: nothing shows whether its process lives."""


@cache
def recover_build_locks() -> None:
    """Let the build of an op take over the lock file of a process that was killed while it built.

    torch's ``FileBaton`` waits forever for that process to remove the file.
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
    """Wait until the other process removes the lock file after its build; if it was killed, return the file, locked."""
    while path.exists():
        try:
            file = path.open("r+")
            found = os.fstat(file.fileno())
            if file.read() == _MARK:
                is_left = _lock(file) is True
            else:  # locked only if it is old: a build that starts now is about to lock it
                is_left = time.time() - found.st_mtime > _UNMARKED_SECONDS and _lock(file) is not False
            if is_left and path.exists() and os.path.samestat(found, path.stat()):
                log.warning("%s was left by a build that was killed; building the op again", path)
                return _mark(file)
            file.close()
        except FileNotFoundError:
            return None
        time.sleep(seconds)
    return None


def _mark(file: TextIO) -> TextIO:
    """Lock the file for this process and write the mark, if the file system supports locks."""
    file.truncate(0)
    if _lock(file):
        file.seek(0)
        file.write(_MARK)
        file.flush()
    return file


def _lock(file: TextIO) -> bool | None:
    """Lock a file in the kernel; False if another process holds the lock, None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
