"""Write checkpoints atomically, in the background, and remove old ones.

Every rank writes its files into a hidden folder and flushes them to disk. Rank zero reads all of them back, writes the
manifest and renames the folder, which publishes the checkpoint. What a checkpoint contains is described in ``reader``.
"""

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import torch

from lockstep.checkpoint.manifest import Manifest, Progress
from lockstep.checkpoint.reader import file_sha256, published_checkpoints
from lockstep.checkpoint.serialization import copy_to_cpu
from lockstep.config import CheckpointOptions
from lockstep.core import World, atomic_write_json, fsync, read_json
from lockstep.distributed import StopConsensus
from lockstep.runs import Run

log = logging.getLogger(__name__)

_PART_TIMEOUT_SECONDS = 600.0
"""How long rank zero waits for the files of the other ranks."""


class CheckpointWriter:
    """Writes the files of one rank, one checkpoint at a time.

    Args:
        attempt: Number of this attempt; a newer attempt prevents publication.
        on_wait: Called about ten times a second during a wait.

    Attributes:
        seconds: Duration of the last save, up to its publication; 0 before the first.
        error: Why the last save failed on this rank; empty if it did not.
        protected_steps: Steps whose checkpoints are kept in addition to the newest ones.
    """

    def __init__(
        self, run: Run, world: World, attempt: int, options: CheckpointOptions, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.world, self.attempt, self.options, self.on_wait = run, world, attempt, options, on_wait
        self.seconds, self.error = 0.0, ""
        self.protected_steps: set[int] = set()
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._failed_rank: int | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, progress: Progress, parts: Mapping[str, Any], consensus: StopConsensus, known_error: str = "") -> None:
        """Save ``parts`` as this rank's files of a checkpoint, by name; every rank must call.

        Returns once the parts are copied; without ``async_save``, once the checkpoint is published. A failure does not end
        the run: it is logged, and in ``error``. ``known_error`` is the reason for which this rank cannot save, if it cannot.
        """
        self.wait_until_finished(consensus)
        if self.options.async_save:
            parts = copy_to_cpu(dict(parts))
        self._written.clear()
        self._failed_rank = None
        self._thread = threading.Thread(target=self._save, args=(progress, parts, known_error), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.options.async_save:
            self.wait_until_finished(consensus)

    def wait_until_finished(self, consensus: StopConsensus) -> None:
        """Wait until the save in progress is published or has failed; every rank must call."""
        if self._thread is None:
            return
        while not self._written.wait(0.1):
            self.on_wait()
        # Rank zero must not wait for the files of a rank that could not write them.
        if (rank := consensus.reduce_max(self.world.rank if self.error else -1, self.on_wait)) != -1:
            self._failed_rank = rank
        while self.busy:
            self.wait(0.1)
            self.on_wait()
        consensus.reduce_max(-1, self.on_wait)  # the others wait for the publication here, where the watchdog is reset
        self._thread = None

    def wait(self, seconds: float) -> None:
        """Wait up to ``seconds`` for this rank's save to finish."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _save(self, progress: Progress, parts: Mapping[str, Any], known_error: str) -> None:
        start = time.monotonic()
        final = self.run.checkpoints / f"step-{progress.step:08}"
        hidden = final.with_name(f".{final.name}.{self.attempt}")
        try:
            if known_error:
                raise RuntimeError(known_error)
            hidden.mkdir(exist_ok=True)
            files = {name: _write_part(hidden / name, part) for name, part in parts.items()}
            atomic_write_json(hidden / f"{self.world.rank}.json", files)
            self.error = ""
            self._written.set()
            if self.world.is_rank_zero:
                self._publish(hidden, final, progress)
        except Exception as error:  # state of a user's class may fail in any way
            reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            self.error = f"the checkpoint of step {progress.step} could not be written ({reason})"
            self._written.set()
            log.warning("%s; training continues, and the last complete checkpoint is kept.", self.error)
            if self.world.is_rank_zero:
                shutil.rmtree(hidden, ignore_errors=True)
        self.seconds = time.monotonic() - start

    def _publish(self, hidden: Path, final: Path, progress: Progress) -> None:
        """Wait for the files of all ranks, verify them and rename the folder."""
        deadline = time.monotonic() + _PART_TIMEOUT_SECONDS
        files: dict[str, tuple[int, str]] = {}
        for rank in range(self.world.size):
            written = hidden / f"{rank}.json"
            while not written.exists():
                if self._failed_rank is not None:
                    raise RuntimeError(f"rank {self._failed_rank} could not write its part; its log says why")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"rank {rank} has not written its part in {_PART_TIMEOUT_SECONDS:g} seconds")
                time.sleep(0.01)
            files |= read_json(written)
            written.unlink()
        for name, (_, digest) in files.items():
            if file_sha256(hidden / name) != digest:
                raise RuntimeError(f"{name}: checksum mismatch after write")
        Manifest(progress, self.world.size, self.attempt, time.time(), files).write(hidden)
        fsync(hidden)
        if self.run.newest_attempt != self.attempt:  # an older attempt may still run on a node that Slurm considers lost
            raise RuntimeError("another attempt of this run has begun")
        if final.exists():  # damaged, or the run would have resumed from it
            shutil.rmtree(final)
        hidden.rename(final)
        fsync(self.run.checkpoints)
        try:
            self._remove_old(progress.step)
        except OSError as error:
            log.warning("old checkpoints in %s could not be removed (%s)", self.run.checkpoints, error.strerror)

    def _remove_old(self, step: int) -> None:
        """Remove checkpoints that are neither among the newest nor protected, and what failed saves up to ``step`` left."""
        for path in published_checkpoints(self.run.checkpoints)[self.options.keep_last :]:
            if int(path.name.removeprefix("step-")) not in self.protected_steps:
                removed = path.rename(path.with_name(f".{path.name}.gone"))  # atomically: half a checkpoint is never visible
                shutil.rmtree(removed, ignore_errors=True)
        for path in self.run.checkpoints.glob(".step-*"):
            _, name, attempt = path.name.rsplit(".", 2)
            # Another rank may already be writing the next checkpoint.
            if attempt == "gone" or int(attempt) < self.attempt or int(name.removeprefix("step-")) <= step:
                shutil.rmtree(path, ignore_errors=True)


def _write_part(path: Path, content: Any) -> tuple[int, str]:
    """Write ``content``, flush it to disk, and return its size and SHA-256."""
    with _HashingWriter(FileIO(path, "w")) as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), file.digest.hexdigest()


class _HashingWriter(BufferedWriter):
    """A file whose checksum is computed while it is written."""

    def __init__(self, file: FileIO) -> None:
        super().__init__(file)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)
