"""Prepare a data folder atomically, once, even if several jobs try at the same time or one is killed."""

import logging
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from lockstep.core import UsageError, fsync

log = logging.getLogger(__name__)


def prepare_folder(target: Path, fill: Callable[[Path], None], elsewhere: str = "prepare it") -> None:
    """Fill a temporary folder beside ``target``, flush it to disk, and rename it to ``target``, unless ``target`` exists.

    Other processes that prepare the same folder wait. The kernel releases the lock of a killed process, and the next process
    removes its temporary folder.

    Args:
        elsewhere: Remedy in the error message: what to do on another machine.

    Raises:
        UsageError: The folder cannot be written, or the download failed.
    """
    if os.path.exists(target):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another job to prepare %s", target)
            held = lock.acquire()
        with held:
            if not os.path.exists(target):
                _fill_and_publish(target, fill)
    # torchvision raises a RuntimeError if no mirror answers or a checksum is wrong.
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"data.root: {target} is missing and could not be prepared ({' '.join(str(error).split())}); "
            f"on another machine, {elsewhere}, and copy the folder to this path."
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
