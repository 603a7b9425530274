"""Checkpoints that are there whole or not at all: how they are written, published, found again and cleaned up.

``checkpoints/step-00000120/`` holds ``model.ckpt`` (lightning's own: weights, optimizer, schedule, loops, callbacks),
``rank-0.pt`` … (what each rank alone knows, see ``state``) and ``manifest.json`` (size and SHA-256 of each file, step, epoch,
batches, world size). Every rank writes its files into a hidden folder beside and flushes them to disk; rank zero reads all
of them back, writes the manifest and renames the folder. Nobody needs a pointer to the newest one: it is the last whole one.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from lockstep.checkpoint.reader import MANIFEST_FILE, file_sha256, published_checkpoints
from lockstep.checkpoint.serialization import copy_to_cpu
from lockstep.core import World, atomic_write_json, fsync

log = logging.getLogger(__name__)


_PART_TIMEOUT_SECONDS = 600.0
"""How long rank zero waits for the files of the other ranks."""


class CheckpointWriter:
    """Saves what one rank has, in the background if it may; at reduce_max one save at a time.

    Args:
        checkpoints: Folder of all checkpoints of the run.
        world: Who saves together.
        attempt: Number of this start of the run.
        background: Whether training goes on while the files are written.
        keep: How many of the newest stay.
        is_owner: Whether this attempt is still the one that may write.
        on_wait: Called about ten times a second while something is waited for.

    Attributes:
        seconds: Time that the last save took, from the first byte to its publication; 0 before the first.
        failure: What was wrong with the last save; empty if nothing.
        kept: Steps that are kept beside the newest.
    """

    def __init__(
        self,
        checkpoints: Path,
        world: World,
        attempt: int,
        background: bool,
        keep: int,
        is_owner: Callable[[], bool],
        on_wait: Callable[[], None],
    ) -> None:
        self.checkpoints, self.world, self.attempt, self.background, self.keep = checkpoints, world, attempt, background, keep
        self.is_owner, self.on_wait = is_owner, on_wait
        self.seconds, self.error = 0.0, ""
        self.protected_steps: set[int] = set()
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._missing: int | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is going on."""
        return self._thread is not None and self._thread.is_alive()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step will be."""
        return self.checkpoints / f"step-{step:08}"

    def save(
        self,
        step: int,
        parts: Mapping[str, Any],
        facts: Mapping[str, Any],
        reduce_max: Callable[[int], int],
        known_error: str = "",
    ) -> None:
        """Save ``parts``, by file name, as this rank's share of the checkpoint of ``step``; every rank must call.

        Returns when the parts have been copied, or without a background when they are published. Errors do not end the
        run: they are in ``failure``, and the log.

        Args:
            step: Optimizer steps done.
            parts: What goes into files of their own.
            facts: What goes into the manifest.
            reduce_max: As for ``settle``.
            known_error: Why this rank knows already that it cannot save; empty if it may.
        """
        self.wait_until_finished(reduce_max)
        if self.background:
            parts = copy_to_cpu(dict(parts))
        self._written.clear()
        self._missing = None
        self._thread = threading.Thread(
            target=self._save, args=(step, parts, facts, known_error), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self.background:
            self.wait_until_finished(reduce_max)

    def wait_until_finished(self, reduce_max: Callable[[int], int]) -> None:
        """Wait until nothing is being saved; every rank must call.

        Args:
            reduce_max: Gives all ranks the largest number that one of them has given: nobody waits for the part of a rank that
                could not write it.
        """
        if self._thread is None:
            return
        while not self._written.wait(0.1):
            self.on_wait()
        if (rank := reduce_max(self.world.rank if self.error else -1)) != -1:
            self._missing = rank
        while self.busy:
            self.wait(0.1)
            self.on_wait()
        reduce_max(-1)  # the others wait for the publication here, where that is no hang
        self._thread = None

    def wait(self, seconds: float) -> None:
        """Wait until this rank saves nothing, but no longer than that."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _save(self, step: int, parts: Mapping[str, Any], facts: Mapping[str, Any], known_error: str) -> None:
        began = time.monotonic()
        final = self.path(step)
        beside = self.checkpoints / f".{final.name}.{self.attempt}"
        try:
            if known_error:
                raise RuntimeError(known_error)
            beside.mkdir(exist_ok=True)
            files = {name: _write_part(beside / name, part) for name, part in parts.items()}
            atomic_write_json(beside / f"{self.world.rank}.json", files)
            self.error = ""
            self._written.set()
            if self.world.is_rank_zero:
                self._publish(beside, final, facts)
        except Exception as error:  # a user's own state may fail in any way, and a run does not end because of a save
            reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            self.error = f"the checkpoint of step {step} could not be written ({reason})"
            self._written.set()
            log.warning("%s; training goes on, and the last whole checkpoint is kept.", self.error)
            if self.world.is_rank_zero:
                shutil.rmtree(beside, ignore_errors=True)
        self.seconds = time.monotonic() - began

    def _publish(self, beside: Path, final: Path, facts: Mapping[str, Any]) -> None:
        """Wait for all ranks, read everything back, and make the checkpoint appear."""
        deadline = time.monotonic() + _PART_TIMEOUT_SECONDS
        files: dict[str, Any] = {}
        for rank in range(self.world.size):
            told = beside / f"{rank}.json"
            while not told.exists():
                if self._missing is not None:
                    raise RuntimeError(f"rank {self._missing} could not write its part; its log says why")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"rank {rank} has not written its part")
                time.sleep(0.01)
            files |= json.loads(told.read_text())
        for name, (_, digest) in files.items():
            if file_sha256(beside / name) != digest:
                raise RuntimeError(f"{name} reads back otherwise than it was written")
        for rank in range(self.world.size):
            (beside / f"{rank}.json").unlink()
        manifest = {**facts, "world_size": self.world.size, "attempt": self.attempt, "time": time.time(), "files": files}
        atomic_write_json(beside / MANIFEST_FILE, manifest)
        fsync(beside)
        if not self.is_owner():
            raise RuntimeError("another attempt of this run has begun")
        if final.exists():  # damaged, or it would have been gone on from
            shutil.rmtree(final)
        beside.rename(final)
        fsync(self.checkpoints)
        try:
            self._clean_up(int(facts["step"]))
        except OSError as error:
            log.warning("old checkpoints in %s could not be removed (%s)", self.checkpoints, error.strerror)

    def _clean_up(self, done: int) -> None:
        """Remove what is neither among the newest nor kept for its score, and what was left half-written before ``done``."""
        published = published_checkpoints(self.checkpoints)
        for path in published[self.keep :]:
            if int(path.name.removeprefix("step-")) not in self.protected_steps:
                gone = path.rename(path.with_name(f".{path.name}.gone"))  # at once no checkpoint any more
                shutil.rmtree(gone, ignore_errors=True)
        for path in self.checkpoints.glob(".step-*"):
            _, step, attempt = path.name.rsplit(".", 2)
            # Not what another rank, ahead of this one, has begun to write for the next checkpoint.
            if attempt == "gone" or int(attempt) < self.attempt or int(step.removeprefix("step-")) <= done:
                shutil.rmtree(path, ignore_errors=True)


def _write_part(path: Path, content: Any) -> tuple[int, str]:
    """Write ``content``, flush it to disk, and return its size and SHA-256."""
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        torch.save(content, cast(IO[bytes], hashing))
        file.flush()
        os.fsync(file.fileno())
    return hashing.size, hashing.digest.hexdigest()


class _HashingFile:
    """A file that is hashed while it is written."""

    def __init__(self, file: Any) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        self.file.write(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()
