"""Progress of a run: ``status.json``, and log lines or a progress bar, without waiting for the device or other ranks."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lockstep.monitoring.throughput import ThroughputMonitor
from lockstep.monitoring.wandb_logger import run_logger
from lockstep.runs import Run, RunProgress

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 5.0
"""Time between two reports."""


class StatusReporter(Callback):
    """Writes ``status.json`` and, without a progress bar, a log line on rank zero every few seconds.

    Args:
        log_lines: Whether to log lines, as without a progress bar.
        warning: Returns what is currently wrong with the run's files, or an empty string.
    """

    def __init__(
        self, run: Run, throughput: ThroughputMonitor, attempt: int, log_lines: bool, warning: Callable[[], str]
    ) -> None:
        self.run, self.throughput, self.attempt, self.log_lines, self.warning = run, throughput, attempt, log_lines, warning
        self._next_report = 0.0
        self._start: tuple[float, int] | None = None  # time and step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and time.monotonic() >= self._next_report and trainer.global_step:
            self.report(trainer, "training")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.log_lines and not trainer.sanity_checking and trainer.state.fn == "fit":
            log.info("epoch %d  step %d  %s", trainer.current_epoch, trainer.global_step, _format_metrics(trainer, "val"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report(trainer, "trained")

    def report(self, trainer: Trainer, state: str) -> None:
        """Write ``status.json`` and a log line now."""
        if not trainer.is_global_zero:
            return
        self.run.check_owner(self.attempt)
        self._next_report = time.monotonic() + _INTERVAL_SECONDS
        steps = _total_steps(trainer)
        left = self._seconds_left(trainer.global_step, steps)
        progress = RunProgress(
            status=state,
            step=trainer.global_step,
            steps=steps,
            epoch=trainer.current_epoch,
            samples_per_second=round(self.throughput.samples_per_second, 1),
            seconds_left=left,
            attempt=self.attempt,
            world_size=trainer.world_size,
            metrics=latest_metrics(trainer),
            warning=self.warning(),
        )
        try:
            progress.write(self.run.status)
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.run.status, error.strerror)
        if self.log_lines and state == "training" and trainer.global_step:
            log.info(
                "step %d%s  epoch %d  %s  %.0f samples/s%s",
                trainer.global_step,
                f"/{steps}" if steps else "",
                trainer.current_epoch,
                _format_metrics(trainer, "train"),
                self.throughput.samples_per_second,
                "" if left is None else f"  {left:.0f} s left",
            )

    def _seconds_left(self, step: int, steps: int | None) -> float | None:
        if steps is None or self._start is None or step <= self._start[1]:
            return None
        passed, done = time.monotonic() - self._start[0], step - self._start[1]
        return round(passed / done * (steps - step), 1)


class ProgressBar(TQDMProgressBar):
    """A progress bar with the metrics that were logged last."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        return {name: f"{value:.4g}" for name, value in latest_metrics(trainer).items() if name.startswith(("train", "val"))}


def _total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; with several optimizers, an estimate from those of a batch so far. None without end."""
    batches, limit = trainer.estimated_stepping_batches, trainer.max_steps
    if math.isinf(batches) or batches < 0:
        return None
    if (done := trainer.fit_loop.total_batch_idx + 1) and not trainer.lightning_module.automatic_optimization:
        batches = round(batches * trainer.global_step / done)
    return int(batches if limit == -1 else min(batches, limit))


def _format_metrics(trainer: Trainer, stage: str) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in latest_metrics(trainer).items() if name.startswith(stage))


def latest_metrics(trainer: Trainer) -> dict[str, float]:
    """The metrics that were logged last, as numbers; ``trainer.logged_metrics`` are still on the device."""
    logger = run_logger(trainer)
    return {} if logger is None else logger.metrics.latest
