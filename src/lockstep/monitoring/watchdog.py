"""A rank that makes no progress: noticed, named, and ended, so that the run can start again.

Each rank has a thread that looks at the time since its last sign of progress: a batch fetched, a step done, a save begun. What
is too long follows from what was usual so far. Nothing is sent to anybody until then; after it, every stuck rank writes down
where it stands and what it was doing, and the lowest of them names the one that is behind, or does not answer at all.
"""

import faulthandler
import json
import logging
import os
import platform
import sys
import threading
import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lockstep.core import World, atomic_write_json
from lockstep.runs import Failure, Run, record_failure

log = logging.getLogger(__name__)


_SLOWDOWN_FACTOR = 10.0
"""What is so many times longer than the longest of late is too long."""


_FIRST_STEP_SECONDS = 1800.0
"""The least for the first step, for which workers are started and a model may be compiled."""


_REPORT_SECONDS = 5.0
"""How long the others may take to write down where they stand."""


class Watchdog(Callback):
    """Watches over this rank while it trains.

    Args:
        run: Where stuck ranks meet.
        world: Who they are.
        attempt: Number of this start of the run.
        seconds: The least time without progress that is too long.
    """

    def __init__(self, run: Run, world: World, attempt: int, seconds: float) -> None:
        self.run, self.world, self.attempt, self.seconds = run, world, attempt, seconds
        self._signs = 0
        self._last = time.monotonic()
        self._gaps: deque[float] = deque(maxlen=200)
        self._over = threading.Event()
        self._is_first = True

    def heartbeat(self, *_: Any, **__: Any) -> None:
        """Something was done."""
        now = time.monotonic()
        if not self._is_first:
            self._gaps.append(now - self._last)
        self._last = now
        self._signs += 1

    def reset(self) -> None:
        """What is waited for now may take long: a save, which has a limit of its own."""
        self._last = time.monotonic()

    on_train_batch_start = on_validation_batch_end = heartbeat
    on_train_epoch_start = on_save_checkpoint = heartbeat

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.heartbeat()
        else:
            self._begin()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.heartbeat()
        else:
            self.stop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()

    on_predict_start = on_test_start

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.heartbeat()
        self._is_first = False

    on_test_batch_end = on_predict_batch_end = on_train_batch_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        """Watch no more."""
        self._over.set()

    @property
    def limit(self) -> float:
        """What is too long now, in seconds."""
        least = max(self.seconds, _FIRST_STEP_SECONDS) if self._is_first else self.seconds
        return max(least, _SLOWDOWN_FACTOR * max(self._gaps, default=0.0))

    def _begin(self) -> None:
        self._over, self._is_first, self._last = threading.Event(), True, time.monotonic()
        threading.Thread(target=self._watch, args=(self._over,), name="hang", daemon=True).start()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(min(1.0, self.seconds / 5)):
            silent = time.monotonic() - self._last
            if silent > self.limit:
                try:
                    self._tell(silent)
                finally:  # whatever: a disk may be full
                    os._exit(1)

    def _tell(self, silent: float) -> None:
        """Write down what this rank was doing; the lowest of the stuck ranks says whose fault it is."""
        print(
            f"lockstep: rank {self.world.rank} has made no progress for {silent:.0f} s; it was here:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        folder = self.run.log(self.attempt, 0).parent
        atomic_write_json(folder / f"stuck-{self.world.rank}.json", {"signs": self._signs, "host": platform.node()})
        time.sleep(_REPORT_SECONDS)
        told: dict[int, int] = {}
        for path in folder.glob("stuck-*.json"):
            told[int(path.stem.removeprefix("stuck-"))] = json.loads(path.read_text())["signs"]
        if self.world.rank == min(told):
            record_failure(self.run, self.attempt, self._named(told, silent))

    def _named(self, told: dict[int, int], silent: float) -> Failure:
        mute = [rank for rank in range(self.world.size) if rank not in told]
        rank = mute[0] if mute else min(told, key=lambda rank: (told[rank], rank))
        what = "does not answer" if mute else "is behind the others"
        report = f"No progress for {silent:.0f} s: rank {rank} {what}; stacks are in the logs of the other ranks and its own."
        return Failure(rank, self.world.size, rank // self.world.local_size, "", report)
