"""Watchdog: detect a rank that makes no progress, name it, and end the attempt so that the run can restart.

Each rank has a thread that measures the time since its last heartbeat: a batch fetched, a step done, a save begun. The limit
follows from the intervals so far. Ranks do not communicate before it. After it, every stuck rank dumps its stacks, and the
lowest of them names the rank that does not answer or is behind.
"""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lockstep.core import World, atomic_write_json, read_json
from lockstep.distributed import write_flight_record
from lockstep.runs import Failure, Run, record_failure

_SLOWDOWN_FACTOR = 10.0
"""The limit is at least this many times the longest recent interval between heartbeats."""

_FIRST_STEP_FACTOR, _FIRST_STEP_SECONDS = 3.0, 60.0
"""Factor and minimum of the limit for the first step, which starts workers and may compile the model."""

_REPORT_SECONDS = 5.0
"""Time for all stuck ranks to write their records."""

_REPORT_LIMIT_SECONDS = 30.0
"""Time for the whole report; its disk may hang."""


@dataclass(frozen=True)
class StuckRank:
    """A rank that reached the limit, and the number of its heartbeats: ``logs/<attempt>/stuck-<rank>.json``."""

    rank: int
    heartbeats: int


class Watchdog(Callback):
    """Watch this rank while it trains, validates, tests or predicts.

    Args:
        seconds: Minimum of the limit: time without a heartbeat after which the rank is stuck.
        enter: Reports the phase that this rank enters.
    """

    def __init__(
        self, run: Run, world: World, attempt: int, seconds: float, enter: Callable[[str], None] = lambda phase: None
    ) -> None:
        self.run, self.world, self.attempt, self.seconds, self.enter = run, world, attempt, seconds, enter
        self._heartbeats = 0
        self._last_time = time.monotonic()
        self._intervals: deque[float] = deque(maxlen=200)
        self._stopped = threading.Event()
        self._is_first_step = True

    def heartbeat(self, *_: Any, **__: Any) -> None:
        """Record progress."""
        now = time.monotonic()
        if not self._is_first_step:
            self._intervals.append(now - self._last_time)
        self._last_time = now
        self._heartbeats += 1

    def reset(self) -> None:
        """Restart the interval; called while waiting for a save, which has its own limit."""
        self._last_time = time.monotonic()

    def stop(self, *_: Any, **__: Any) -> None:
        """Stop watching."""
        self._stopped.set()

    @property
    def limit(self) -> float:
        """Seconds without a heartbeat after which this rank is stuck."""
        least = max(_FIRST_STEP_FACTOR * self.seconds, _FIRST_STEP_SECONDS) if self._is_first_step else self.seconds
        return max(least, _SLOWDOWN_FACTOR * max(self._intervals, default=0.0))

    def _start(self, *_: Any, **__: Any) -> None:
        self.enter("first step")
        self._stopped, self._is_first_step, self._last_time = threading.Event(), True, time.monotonic()
        threading.Thread(target=self._watch, args=(self._stopped,), name="watchdog", daemon=True).start()

    def _finish_step(self, *_: Any, **__: Any) -> None:
        self.heartbeat()
        if self._is_first_step:
            self.enter("running")
            self._is_first_step = False

    on_train_start = on_test_start = on_predict_start = _start
    on_train_epoch_start = on_train_batch_start = on_save_checkpoint = heartbeat
    on_train_batch_end = on_test_batch_end = on_predict_batch_end = _finish_step
    on_fit_end = on_test_end = on_predict_end = on_exception = stop

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.state.fn == "fit":
            self.heartbeat()
        else:
            self._finish_step()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.heartbeat()
        else:
            self._start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.heartbeat()
        else:
            self.stop()

    def _watch(self, stopped: threading.Event) -> None:
        while not stopped.wait(min(1.0, self.seconds / 5)):
            silent = time.monotonic() - self._last_time
            if silent > self.limit:
                report = threading.Thread(target=self._report, args=(silent,), name="watchdog report", daemon=True)
                report.start()
                report.join(_REPORT_LIMIT_SECONDS)
                os._exit(1)  # even if the disk is full, or hangs

    def _report(self, silent: float) -> None:
        """Dump the stacks of this rank; the lowest of the stuck ranks records which rank is to blame."""
        text = f"lockstep: rank {self.world.rank} has made no progress for {silent:.0f} s; its stacks:"
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        folder = self.run.attempt_folder(self.attempt)
        mine = StuckRank(self.world.rank, self._heartbeats)
        atomic_write_json(folder / f"stuck-{self.world.rank}.json", asdict(mine))
        threading.Thread(target=write_flight_record, args=(self.world, os.environ), daemon=True).start()  # it may hang too
        time.sleep(_REPORT_SECONDS)
        self.record_stuck(silent)

    def record_stuck(self, silent: float) -> None:
        """Record which rank is to blame, if this is the lowest of the stuck ranks, which alone reads their records."""
        folder = self.run.attempt_folder(self.attempt)
        if self._is_lowest(folder):
            stuck = [StuckRank(**read_json(path)) for path in folder.glob("stuck-*.json")]
            record_failure(self.run, self.attempt, self._blame(stuck, silent))

    def _is_lowest(self, folder: Path) -> bool:
        """Whether this is the lowest of the stuck ranks; opens no file, as all ranks call it."""
        if self.world.rank and (folder / "stuck-0.json").exists():
            return False
        return self.world.rank == min(int(path.stem.partition("-")[2]) for path in folder.glob("stuck-*.json"))

    def _blame(self, stuck: list[StuckRank], silent: float) -> Failure:
        """The failure of the first rank without a record, else of the rank with the fewest heartbeats."""
        missing = sorted(set(range(self.world.size)) - {rank.rank for rank in stuck})
        rank = missing[0] if missing else min(stuck, key=lambda rank: (rank.heartbeats, rank.rank)).rank
        cause = "does not answer" if missing else "is behind the others"
        report = f"No progress for {silent:.0f} s: rank {rank} {cause}; see the stacks in the logs of all ranks."
        return Failure(rank, self.world.size, rank // self.world.local_size, "", report)


def stop_watchdog(trainer: Trainer | None) -> None:
    """Stop watching a rank that someone has stopped on purpose, with a debugger."""
    for callback in trainer.callbacks if trainer is not None else ():  # type: ignore[attr-defined]
        if isinstance(callback, Watchdog):
            callback.stop()
