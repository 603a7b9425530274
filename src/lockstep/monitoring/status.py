"""What a run says of itself while it trains: throughput, a line or a bar, ``status.json``; and the guard against a NaN loss.

Nothing here waits for the device or for other ranks, except at the steps that are logged.
"""

import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lockstep.core import atomic_write_json
from lockstep.monitoring.csv_logger import CsvMetricsLogger
from lockstep.monitoring.throughput import ThroughputMonitor
from lockstep.runs import Run

log = logging.getLogger(__name__)


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; None where it has no end."""
    steps = trainer.estimated_stepping_batches
    return None if math.isinf(steps) or steps < 0 else int(steps)


class StatusReporter(Callback):
    """On rank zero: ``status.json`` and, where no progress bar is shown, one short line, every few seconds.

    Args:
        run: Where ``status.json`` goes.
        throughput: Knows the speed.
        seconds: Time between two lines.
        speak: Whether to write lines to the log as well.
        warning: Tells what is wrong with the run's files now; empty if nothing.
    """

    def __init__(
        self,
        run: Run,
        throughput: ThroughputMonitor,
        attempt: int,
        speak: bool,
        warning: Callable[[], str],
        seconds: float = 5.0,
    ) -> None:
        self.run, self.throughput, self.attempt, self.speak, self.seconds = run, throughput, attempt, speak, seconds
        self.warning = warning
        self._next = 0.0
        self._began: tuple[float, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic(), trainer.global_step
        self.report(trainer, "training")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and time.monotonic() >= self._next and trainer.global_step:
            self.report(trainer, "training")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.speak and not trainer.sanity_checking and trainer.state.fn == "fit":
            log.info("epoch %d  step %d  %s", trainer.current_epoch, trainer.global_step, self._scores(trainer, "val"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report(trainer, "trained")

    def report(self, trainer: Trainer, state: str) -> None:
        """Write ``status.json`` now, and a line."""
        if not trainer.is_global_zero:
            return
        self._next = time.monotonic() + self.seconds
        steps, left = total_steps(trainer), self._seconds_left(trainer)
        content = {
            "status": state,
            "step": trainer.global_step,
            "steps": steps,
            "epoch": trainer.current_epoch,
            "samples_per_second": round(self.throughput.samples_per_second, 1),
            "seconds_left": left,
            "attempt": self.attempt,
            "world_size": trainer.world_size,
            "metrics": latest_metrics(trainer),
            "warning": self.warning(),
            "time": time.time(),
        }
        try:
            atomic_write_json(self.run.status, content)
        except OSError as error:
            log.warning("%s could not be written (%s)", self.run.status, error.strerror)
        if self.speak and state == "training" and trainer.global_step:
            left_text = "" if left is None else f"  {left:.0f} s left"
            log.info(
                "step %d%s  epoch %d  %s  %.0f samples/s%s",
                trainer.global_step,
                f"/{steps}" if steps else "",
                trainer.current_epoch,
                self._scores(trainer, "train"),
                self.throughput.samples_per_second,
                left_text,
            )

    def _seconds_left(self, trainer: Trainer) -> float | None:
        steps = total_steps(trainer)
        if steps is None or self._began is None or trainer.global_step <= self._began[1]:
            return None
        passed, done = time.monotonic() - self._began[0], trainer.global_step - self._began[1]
        return round(passed / done * (steps - trainer.global_step), 1)

    @staticmethod
    def _scores(trainer: Trainer, stage: str) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in latest_metrics(trainer).items() if name.startswith(stage))


class ProgressBar(TQDMProgressBar):
    """A bar on a terminal; it shows what was logged last and so never waits for the device by itself."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        return {name: f"{value:.4g}" for name, value in latest_metrics(trainer).items() if name.startswith(("train", "val"))}


def latest_metrics(trainer: Trainer) -> dict[str, float]:
    """The metrics that were logged last, as numbers; ``trainer.logged_metrics`` are still on the device."""
    return next((logger.latest for logger in trainer.loggers if isinstance(logger, CsvMetricsLogger)), {})


def is_interactive() -> bool:
    """Whether a person sees the output as it comes."""
    return sys.stderr.isatty() and sys.stdout.isatty()
