"""Make a folder of data appear whole or not at all, however many jobs try at once and whatever is killed."""

import logging
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from lockstep.core import UsageError, fsync

log = logging.getLogger(__name__)


def prepare_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` make a folder beside ``target``, flush it to disk, then rename it to ``target``.

    Nothing happens where ``target`` exists. Another process that wants the same folder waits; the lock is the kernel's,
    so that a killed process does not leave it behind, and what it had begun is removed by the next one.

    Args:
        target: The folder to make.
        fill: Called with an empty folder; downloads, verifies and unpacks into it.

    Raises:
        UsageError: The folder cannot be written, or the download failed; what to do instead is said.
    """
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another job that prepares %s", target)
            lock.acquire()
        try:
            if not target.exists():
                _fill_and_publish(target, fill)
        finally:
            lock.release()
    # torchvision raises a RuntimeError where no mirror answers or a checksum is wrong.
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"data.root: {target} is missing and could not be prepared ({' '.join(str(error).split())}); "
            "prepare it on a machine that can and copy it here."
        ) from error


def _fill_and_publish(target: Path, fill: Callable[[Path], None]) -> None:
    for stale in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(stale)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        fill(partial)
        for path in [*partial.rglob("*"), partial]:
            fsync(path)
        partial.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("prepared %s", target)
