"""Write checkpoints atomically, in the background, and remove old ones.

Every rank writes its files into a hidden folder and flushes them to disk. The ranks read all of them back, each an equal
share. Rank zero gathers checksums and results, writes the manifest and renames the folder, which publishes the checkpoint.
What a checkpoint contains is described in ``reader``.
"""

import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from lockstep.checkpoint.checksums import FileSums, share_pieces, verify_pieces, write_file
from lockstep.checkpoint.manifest import Manifest, Progress
from lockstep.checkpoint.reader import published_checkpoints
from lockstep.checkpoint.serialization import copy_to_cpu, count_bytes
from lockstep.config import CheckpointOptions
from lockstep.core import SaveError, World, fsync
from lockstep.distributed import SignalReceiver, StopConsensus, gather, new_group, scatter
from lockstep.runs import Run, checkpoint_order

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 10.0
"""Time that a stop takes besides its save: to reach consensus, to close W&B and to be requeued."""

_EXIT_SECONDS = 60.0
"""Time after which a process whose disk hangs exits in any case: its error report may hang too."""


class CheckpointWriter:
    """Writes the files of one rank, one checkpoint at a time; every rank must make one.

    Args:
        attempt: Number of this attempt; a newer attempt prevents publication.
        signals: After a stop signal, a wait ends earlier.
        on_wait: Called about ten times a second during a wait that has a limit.

    Attributes:
        seconds: Duration of the last save, up to its publication; 0 before the first.
        error: Why the last save failed on this rank; empty if it did not.
        published: The newest checkpoint, which rank zero has published or from which the run has resumed.
        scores: Scores of checkpoints, by step. The best of those that are published are kept in addition to the newest.
        protected: Names of checkpoints that are never removed.
        before_publication: Called on rank zero, in the background, before the next checkpoint is published.
    """

    def __init__(
        self,
        run: Run,
        world: World,
        attempt: int,
        options: CheckpointOptions,
        signals: SignalReceiver | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.world, self.attempt, self.options = run, world, attempt, options
        self.signals, self.on_wait = signals or SignalReceiver(), on_wait
        self.seconds, self.error = 0.0, ""
        self.published: Path | None = None
        self.scores: dict[int, float] = {}
        self.protected: set[str] = set()
        self.before_publication: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._group = new_group(world)  # of the thread: the collectives of two threads would mix in one group
        self._step = 0
        self._limit, self._deadline, self._stop_by = 0.0, math.inf, math.inf

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_hung(self) -> bool:
        """Whether a save has been in progress for longer than its limits."""
        return self.busy and time.monotonic() > self._deadline + self._limit

    def save(
        self,
        progress: Progress,
        parts: Mapping[str, Any],
        consensus: StopConsensus,
        known_error: str = "",
        in_background: bool = True,
    ) -> None:
        """Save ``parts`` as this rank's files of a checkpoint, by name; every rank must call.

        Returns once the parts are copied; without ``async_save``, once the checkpoint is published. A failure does not end
        the run: it is logged and stored in ``error``.

        Args:
            known_error: Why this rank cannot save; empty if it can.
            in_background: Whether the parts may be copied; False for those that do not fit into memory.

        Raises:
            SaveError: The previous save hangs on a rank.
        """
        self.wait_until_finished(consensus)
        size = consensus.total(count_bytes(dict(parts)))
        self._limit = self.options.timeout_seconds + size / (1e6 * self.options.min_mb_per_second)
        if in_background := in_background and self.options.async_save:
            parts = copy_to_cpu(dict(parts))
        self._written.clear()
        self._step, self._deadline = progress.step, time.monotonic() + self._limit
        scores = dict(self.scores)  # a later score must not change what this save removes
        arguments = (progress, parts, scores, known_error)
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if not in_background:
            self.wait_until_finished(consensus)

    def wait_until_finished(self, consensus: StopConsensus) -> None:
        """Wait until the save in progress is published or has failed; every rank must call.

        Raises:
            SaveError: The files of a rank are still missing after the limit of the save; all ranks raise it.
        """
        if self._thread is None:
            return
        rank = self.world.rank
        while not (self._written.wait(0.1) or self._is_over(self._deadline)):
            self.on_wait()
        # By a collective, because the file system may hang.
        if (hung := consensus.reduce_max(-1 if self._written.is_set() else rank, self._reset_in_time)) != -1:
            self._give_up(f"rank {hung} has not written its files")
        while self.busy and not self._is_over(self._deadline + self._limit):
            self.wait(0.1)
            self.on_wait()
        if self.world.is_rank_zero and not self.busy:
            self._remove_failed_saves()
        # The other ranks wait for the publication here.
        if (hung := consensus.reduce_max(rank if self.busy else -1, self._reset_in_time)) != -1:
            self._give_up(f"rank {hung} has not verified its share" if hung else "rank 0 has not published it")
        self._thread = None

    def _is_over(self, deadline: float) -> bool:
        """Whether a wait must end: at ``deadline``, or soon after a stop signal, in about the time of two saves."""
        if self.signals.received is not None:
            self._stop_by = min(self._stop_by, time.monotonic() + SHUTDOWN_SECONDS + 2 * (self.seconds or self._limit))
        return time.monotonic() > min(deadline, self._stop_by)

    def _reset_in_time(self) -> None:
        """Reset the watchdog while the ranks may wait for a save; later it reports the rank that does not answer."""
        # The other ranks give up at their own limits first.
        if self._is_over(math.inf) and time.monotonic() > self._stop_by + SHUTDOWN_SECONDS:
            self._give_up("another rank does not answer during the save")
        if not self._is_over(self._deadline + self._limit):
            self.on_wait()

    def _give_up(self, what: str) -> NoReturn:
        timer = threading.Timer(_EXIT_SECONDS, os._exit, [1])
        timer.daemon = True
        timer.start()
        raise SaveError(
            f"{what} of the checkpoint of step {self._step} in {time.monotonic() - self._deadline + self._limit:.0f} s: a disk "
            "hangs, or is slower than checkpoint.min_mb_per_second; check the disk, or lower this limit."
        )

    def remove_debris(self) -> None:
        """Remove what failed saves and killed processes have left; call it before this attempt writes."""
        self._remove_failed_saves()
        for path in self.run.folder.glob(".*.*.[0-9]*"):  # of atomic writes
            if path.suffix != f".{os.getpid()}":
                path.unlink(missing_ok=True)

    def _remove_failed_saves(self) -> None:
        for path in self.run.checkpoints.glob(".step-*"):
            attempt = path.name.rpartition(".")[2]
            if attempt == "gone" or (attempt.isdigit() and int(attempt) <= self.attempt):
                shutil.rmtree(path, ignore_errors=True)

    def wait(self, seconds: float) -> None:
        """Wait up to ``seconds`` for this rank's save to finish."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _save(self, progress: Progress, parts: Mapping[str, Any], scores: Mapping[int, float], known_error: str) -> None:
        """Write this rank's files, verify as many bytes of all files, and publish the checkpoint on rank zero."""
        start = time.monotonic()
        final = self.run.checkpoints / f"step-{progress.step:08}{'-end' if progress.has_ended else ''}"
        hidden = final.with_name(f".{final.name}.{self.attempt}")
        files, error = {}, known_error
        try:
            if not known_error:
                hidden.mkdir(exist_ok=True)
                files = {name: write_file(hidden / name, part) for name, part in parts.items()}
        except Exception as exception:  # state of a user's class may fail in any way
            error = _reason(exception)
        self._written.set()
        try:
            files, error = self._verify(hidden, files, error)
            if self.world.is_rank_zero and not error:
                self._publish(hidden, final, Manifest(progress, self.world.size, self.attempt, time.time(), files))
                try:
                    self._remove_old(scores)
                except OSError as exception:  # the checkpoint is published all the same
                    log.warning("old checkpoints could not be removed (%s)", _reason(exception))
        except Exception as exception:  # the manifest cannot be written, another attempt owns the run, or a rank has died
            error = _reason(exception)
        self.error = f"the checkpoint of step {progress.step} could not be written ({error})" if error else ""
        if error:
            log.warning("%s; training continues, and the last complete checkpoint is kept.", self.error)
            if self.world.is_rank_zero:
                shutil.rmtree(hidden, ignore_errors=True)
        self.seconds = time.monotonic() - start

    def _verify(self, folder: Path, files: Mapping[str, FileSums], error: str) -> tuple[dict[str, FileSums], str]:
        """Read back the files of all ranks together; return them and the first error on rank zero, else this rank's error.

        A rank with an ``error`` takes part, so that no other waits for it.
        """
        reports = gather((dict(files), error), self.world, self._group)
        written = {name: sums for of_rank, _ in reports for name, sums in of_rank.items()}
        shares = share_pieces({} if any(failure for _, failure in reports) else written, self.world.size)
        # Another node, if there is one, reads what a rank has written: its page cache does not hold it.
        shift = self.world.local_size % self.world.size
        pieces = scatter([*shares[shift:], *shares[:shift]], self.world, self._group)
        try:
            verify_pieces(folder, pieces)
        except Exception as exception:  # of any kind: the other ranks wait for this rank's report
            error = _reason(exception)
        failures = enumerate(gather(error, self.world, self._group))
        return written, next((f"rank {rank}: {failure}" if rank else failure for rank, failure in failures if failure), error)

    def _publish(self, hidden: Path, final: Path, manifest: Manifest) -> None:
        """Write the manifest and rename the folder."""
        manifest.write(hidden)
        fsync(hidden)
        self.before_publication()
        self.run.check_owner(self.attempt)  # this one may run on a node that Slurm considers lost
        if final.exists():  # damaged, or the run would have resumed from it
            shutil.rmtree(final)
        hidden.rename(final)
        self.published = final  # even if the flush fails: another save must not replace it
        fsync(self.run.checkpoints)

    def summary(self) -> dict[str, Any]:
        """On rank zero, the fields of ``RunResult`` about checkpoints: the newest one, and the best score."""
        ranked = sorted(self.scores, key=lambda step: (self.scores[step], step), reverse=self.options.mode == "max")
        best = ranked[0] if ranked else None
        return {
            "checkpoint": str(self.published) if self.published is not None else None,
            "monitor": self.options.monitor,
            "best_score": self.scores[best] if best is not None else None,
            "best_step": best,
        }

    def _remove_old(self, scores: Mapping[int, float]) -> None:
        """Remove checkpoints that are neither among the newest, nor among the best that are published, nor protected."""
        published = published_checkpoints(self.run.checkpoints)
        scored = {path: scores[step] for path in published if (step := checkpoint_order(path)[0]) in scores}
        ranked = sorted(scored, key=lambda path: (scored[path], checkpoint_order(path)), reverse=self.options.mode == "max")
        best = ranked[: self.options.save_top_k] if self.options.monitor is not None else []
        for path in published[self.options.keep_last :]:
            if path in best or path.name in self.protected:
                continue
            try:
                removed = path.rename(path.with_name(f".{path.name}.gone"))  # atomically: half a checkpoint is never visible
            except OSError as error:
                log.warning("the old checkpoint %s could not be removed (%s)", path, error.strerror)
            else:
                shutil.rmtree(removed, ignore_errors=True)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return text or type(error).__name__  # an empty text would mean that nothing has failed
