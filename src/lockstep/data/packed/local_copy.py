"""Copies of shards on a disk of each node, made once per node, by one process, while the ranks already read the originals."""

import ctypes
import hashlib
import logging
import multiprocessing
import os
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from lockstep.core import LockstepError, RunError, World, read_json, setup_logging
from lockstep.data.packed.index import ShardFile
from lockstep.data.packed.scan import MANIFEST_FILE, list_shards
from lockstep.distributed import STOP_SIGNALS, set_process_name

log = logging.getLogger(__name__)

_BLOCK = 16 * 2**20  # bytes


def copy_folder(disk: Path, folder: Path) -> Path:
    """The folder on ``disk`` for copies of the shards in ``folder`` alone."""
    return disk / f"{folder.name}-{hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]}"


def is_copy(path: Path, original: Path) -> bool:
    """Whether ``path`` is a complete copy of the current ``original``."""
    try:
        copy, found = path.stat(), original.stat()
    except OSError:
        return False
    return (copy.st_size, copy.st_mtime_ns) == (found.st_size, found.st_mtime_ns)


def start_copying(folders: Sequence[Path], disk: Path, node: int = 0, nodes: int = 1) -> None:
    """Start a process that copies the shards in ``folders`` to ``disk``, and ends with this process.

    This process must not have threads yet, because the new one is forked.

    Args:
        node, nodes: Number of this node, and of all nodes of the job: each starts at other shards, to spread the reads.
    """
    arguments = (folders, disk, node, nodes, os.getpid())
    multiprocessing.get_context("fork").Process(target=_main, args=arguments, daemon=True).start()


def _main(folders: Sequence[Path], disk: Path, node: int, nodes: int, parent: int) -> None:
    """Copy with low priority; after an error the ranks continue to read the originals."""
    set_process_name("copy-shards")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            return
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    os.nice(10)
    setup_logging(World())
    for folder in folders:
        try:
            copy_shards(folder, copy_folder(disk, folder), node / nodes)
        except (OSError, NotImplementedError, LockstepError) as error:  # NotImplementedError: the disk has no locks
            reason = f"{error.filename or disk}: {error.strerror}" if isinstance(error, OSError) else str(error)
            log.warning("data.copy_to: %s; the shards that have no copy are read from %s", reason.rstrip("."), folder)


def copy_shards(folder: Path, into: Path, start: float = 0.0) -> None:
    """Copy and verify the shards in ``folder`` that are missing in ``into``, a folder of this user.

    Args:
        start: The shard to start at, as a fraction of their number.

    Raises:
        RunError: A shard or its copy is damaged, or another user can write to the copies.
        OSError: The disk is full or cannot be written.
        UsageError: See ``list_shards``.
    """
    into.parent.mkdir(parents=True, exist_ok=True)
    into.mkdir(mode=0o700, exist_ok=True)
    found = into.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RunError(f"{into} can be written by others; remove it, or choose another folder.")
    shards = list_shards(folder)
    with FileLock(into / ".lock"):
        missing = [shard for shard in shards if not is_copy(into / shard.name, folder / shard.name)]
        if not missing:
            return
        for leftover in into.glob(".*.part"):
            leftover.unlink()
        checksums = _packed_checksums(folder)
        first = int(start * len(missing))
        for shard in missing[first:] + missing[:first]:
            _copy(shard, folder, into, checksums.get(shard.name))
        size = sum(shard.size for shard in missing)
        log.info("copied %d shards of %s, %.1f GB, to %s", len(missing), folder, size / 1e9, into)


def _copy(shard: ShardFile, folder: Path, into: Path, expected: str | None) -> None:
    """Copy one shard, and publish the copy once its checksum on the disk is that of the original."""
    original, part = folder / shard.name, into / f".{shard.name}.part"
    digest = hashlib.sha256()
    try:
        with original.open("rb") as source, part.open("wb") as target:
            state = os.fstat(source.fileno())
            while block := source.read(_BLOCK):
                digest.update(block)
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
            os.posix_fadvise(target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # verify the disk, not the page cache
        if expected not in (None, digest.hexdigest()):
            raise RunError(f"{original} does not have its checksum in {MANIFEST_FILE}; pack it again, or copy it again.")
        with part.open("rb") as written:
            if hashlib.file_digest(written, "sha256").digest() != digest.digest():
                raise RunError(f"{part}: checksum mismatch after write; the disk is damaged, choose another one.")
        os.utime(part, ns=(state.st_atime_ns, state.st_mtime_ns))
        part.replace(into / shard.name)
    finally:
        part.unlink(missing_ok=True)


def _packed_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each shard by its name, if ``lockstep pack`` has written them."""
    try:
        return {record["name"]: record["sha256"] for record in read_json(folder / MANIFEST_FILE).get("shards", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
