"""Private folders for offload to NVMe: a rank removes its own, and those of killed ranks."""

import errno
import fcntl
import mmap
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from lockstep.config import missing_nvme_folder
from lockstep.core import UsageError, World
from lockstep.distributed import all_gather

_PREFIX, _LOCK = "lockstep-", "lock"

_LOCKING_SECONDS = 5.0
"""Time that a rank may take to lock its folder, which is hidden until then."""


@contextmanager
def private_folder(place: Path | None, world: World) -> Iterator[Path | None]:
    """Make a folder in ``place`` for this rank alone, and remove it at the end; every rank must call.

    DeepSpeed names its files by rank only, so two runs in one folder would overwrite each other's. A rank holds a lock in its
    folder as long as it lives; folders of killed ranks are removed first.

    Raises:
        UsageError: On all ranks, if one of them cannot use ``place``.
    """
    if place is None:
        yield None
        return
    with ExitStack() as stack:
        folder, problem = None, ""
        try:
            if not place.is_dir():
                raise UsageError(missing_nvme_folder(place, f" on {platform.node()}"))
            _remove_abandoned(place)
            hidden = Path(mkdtemp(prefix=f".{_PREFIX}", dir=place))
            lock = stack.enter_context((hidden / _LOCK).open("w"))
            # Not flock, which DataLoader workers would inherit: they may outlive their rank.
            fcntl.lockf(lock, fcntl.LOCK_EX)
            folder = hidden.rename(place / hidden.name.removeprefix("."))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            _check_direct_io(folder)
        except UsageError as error:
            problem = error.message
        except OSError as error:
            where = f"{place} cannot be written on {platform.node()} ({error.strerror})"
            problem = f"deepspeed.nvme_path: {where}; choose another folder."
        for first in filter(None, all_gather(problem, world)):
            raise UsageError(first)
        yield folder


def _remove_abandoned(place: Path) -> None:
    """Remove the folders of ranks that have died."""
    for folder in [*place.glob(f"{_PREFIX}*"), *place.glob(f".{_PREFIX}*")]:
        # An error means that its rank is alive, another user owns it, or another rank has removed it.
        with suppress(OSError):
            is_hidden = folder.name.startswith(".")
            if not is_hidden or time.time() - folder.stat().st_mtime >= _LOCKING_SECONDS:
                with (folder / _LOCK).open("a" if is_hidden else "r+") as lock:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)


def _check_direct_io(folder: Path) -> None:
    """Check that files in ``folder`` can be written as DeepSpeed does: with direct I/O, in blocks of 1024 bytes."""
    try:
        with open(folder / "direct", "wb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_DIRECT)) as file:
            file.write(memoryview(mmap.mmap(-1, 4096))[:1024])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise UsageError(
            f"deepspeed.nvme_path: {folder.parent} on {platform.node()} does not support direct I/O in blocks of 1024 bytes, "
            "for example because it is a tmpfs; choose a folder on another disk."
        ) from None
