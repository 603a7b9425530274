"""A rank's own folder on NVMe, for what DeepSpeed offloads: gone with the rank, or found and removed by the next one."""

import errno
import fcntl
import mmap
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp

from lockstep.config import missing_nvme_folder
from lockstep.core import UsageError, World
from lockstep.distributed import all_gather

_NAME, _LOCK = "lockstep-", "lock"


_NEW_SECONDS = 5.0
"""A folder that is as new as this may not have been locked yet."""


@contextmanager
def private_folder(place: Path | None, world: World) -> Iterator[Path | None]:
    """A folder in ``place`` that no other rank, run or attempt has, removed at the end; every rank must call.

    DeepSpeed numbers its files by rank alone, so two runs in one place would overwrite each other's. What killed ranks have
    left there is removed first: a rank holds a lock in its folder as long as it lives.

    Raises:
        UsageError: On all ranks, if ``place`` will not do on one of them.
    """
    if place is None:
        yield None
        return
    with ExitStack() as held:
        folder, reason = None, ""
        try:
            if not place.is_dir():
                raise UsageError(missing_nvme_folder(place, f" on {platform.node()}"))
            _remove_abandoned(place)
            folder = Path(mkdtemp(prefix=_NAME, dir=place))
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = held.enter_context((folder / _LOCK).open("w"))
            # Not flock: a DataLoader's worker would inherit it, and may outlive its rank for a while.
            fcntl.lockf(lock, fcntl.LOCK_EX)
            _check_direct_io(folder)
        except UsageError as error:
            reason = error.message
        except OSError as error:
            there = f"{place} cannot be written on {platform.node()} ({error.strerror})"
            reason = f"deepspeed.nvme_path: {there}; choose another folder."
        for told in filter(None, all_gather(reason, world)):
            raise UsageError(told)
        yield folder


def _remove_abandoned(place: Path) -> None:
    for folder in place.glob(f"{_NAME}*"):
        try:
            if time.time() - folder.stat().st_mtime < _NEW_SECONDS:
                continue
            with (folder / _LOCK).open("a") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        except OSError:  # its rank lives, it is somebody else's, or another rank was faster
            continue


def _check_direct_io(folder: Path) -> None:
    """Raise UsageError where files cannot be written as DeepSpeed writes them: past the cache, in steps of 1024 bytes."""
    try:
        file = os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        try:
            os.write(file, memoryview(mmap.mmap(-1, 4096))[:1024])
        finally:
            os.close(file)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise UsageError(
            f"deepspeed.nvme_path: {folder.parent} on {platform.node()} takes no direct I/O in blocks of 1024 bytes, as a disk "
            "in memory does not; choose a folder on another disk."
        ) from None
