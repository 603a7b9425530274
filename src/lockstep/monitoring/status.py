"""Progress of a run: ``status.json`` and log lines, without waiting for the device or other ranks."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lockstep.monitoring.throughput import ThroughputMonitor
from lockstep.monitoring.wandb_logger import run_logger
from lockstep.runs import METRICS_ROW, Run, RunProgress

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 5.0
"""Time between two reports."""

_SHOWN_METRICS = 8
"""How many metrics a line shows; losses and accuracies come first."""


class StatusReporter(Callback):
    """Write ``status.json`` every few seconds, and log a line for each epoch and validation on rank zero.

    Args:
        logs_epochs: Whether to log these lines; False if the user has a progress bar.
        logs_steps: Whether to log a line every few seconds too, if no progress line shows the same.
        warning: Returns what is currently wrong with the run's files, or an empty string.
    """

    def __init__(
        self,
        run: Run,
        throughput: ThroughputMonitor,
        attempt: int,
        logs_epochs: bool,
        logs_steps: bool,
        warning: Callable[[], str],
    ) -> None:
        self.run, self.throughput, self.attempt, self.warning = run, throughput, attempt, warning
        self._logs_epochs, self._logs_steps = logs_epochs, logs_steps
        self._next_report = 0.0
        self._start: tuple[float, int] | None = None  # time and step
        self._ended_epoch = ""  # start of its line, which waits for the metrics that Lightning logs last
        self._logged_row = 0  # the newest when the last line was logged

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and time.monotonic() >= self._next_report and trainer.global_step:
            self.report(trainer, "training")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not loop.batch_progress.is_last_batch:
            self._log_metrics(trainer, f"{format_epoch(trainer)}  {self.format_step(trainer)}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended_epoch = format_epoch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_epoch(trainer)
        self.report(trainer, "trained")

    def _log_epoch(self, trainer: Trainer) -> None:
        if self._ended_epoch:
            self._log_metrics(trainer, self._ended_epoch)
            self._ended_epoch = ""

    def _log_metrics(self, trainer: Trainer, place: str) -> None:
        """Log a line with the metrics that are new since the last one."""
        logger = run_logger(trainer)
        if not trainer.is_global_zero or not self._logs_epochs or logger is None:
            return
        since, self._logged_row = self._logged_row, logger.metrics.row_count
        shown = [name for name in _shown_metrics(trainer) if logger.metrics.logged_in[name] > since]
        log.info("%s", "  ".join([place, *_format_metrics(trainer, shown), *self._format_wait()]))

    def report(self, trainer: Trainer, state: str) -> None:
        """Write ``status.json`` and a log line now."""
        if not trainer.is_global_zero:
            return
        self.run.check_owner(self.attempt)
        self._next_report = time.monotonic() + _INTERVAL_SECONDS
        progress = RunProgress(
            status=state,
            step=trainer.global_step,
            steps=_total_steps(trainer),
            epoch=trainer.current_epoch,
            samples_per_second=round(self.throughput.samples_per_second, 1),
            seconds_left=self._seconds_left(trainer),
            attempt=self.attempt,
            world_size=trainer.world_size,
            metrics=latest_metrics(trainer),
            warning=self.warning(),
        )
        try:
            progress.write(self.run.status)
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.run.status, error.strerror)
        if self._logs_steps and state == "training" and trainer.global_step:
            log.info("%s", "  ".join(filter(None, self.describe(trainer))))

    def describe(self, trainer: Trainer) -> list[str]:
        """The progress of training, most important first: epoch, step, time left, speed, metrics of the training steps."""
        left, speed = self._seconds_left(trainer), self.throughput.samples_per_second
        return [
            format_epoch(trainer),
            self.format_step(trainer),
            "" if left is None else f"{format_seconds(left)} left",
            f"{speed:.0f} samples/s" if speed else "",
            *_format_metrics(trainer, [name for name in _shown_metrics(trainer) if not name.startswith("val")]),
            *self._format_wait(),
        ]

    def _format_wait(self) -> list[str]:
        """The share of the time that training waits for data, if it is known."""
        share = self.throughput.data_wait
        return [] if share is None else [f"{share:.0%} waiting for data"]

    def format_step(self, trainer: Trainer) -> str:
        """The step, and the number of steps if it is known."""
        steps = _total_steps(trainer)
        return f"step {trainer.global_step}{f'/{steps}' if steps else ''}"

    def _seconds_left(self, trainer: Trainer) -> float | None:
        step, steps = trainer.global_step, _total_steps(trainer)
        if steps is None or self._start is None or step <= self._start[1]:
            return None
        passed, done = time.monotonic() - self._start[0], step - self._start[1]
        return round(passed / done * (steps - step), 1)


def _total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, None without a limit; with manual optimization, estimated from the steps per batch."""
    batches, limit = trainer.estimated_stepping_batches, trainer.max_steps
    if math.isinf(batches) or batches < 0:
        return None
    if (done := trainer.fit_loop.total_batch_idx + 1) and not trainer.lightning_module.automatic_optimization:
        batches = round(batches * trainer.global_step / done)
    return int(batches if limit == -1 else min(batches, limit))


def format_epoch(trainer: Trainer) -> str:
    """The epoch, counted from 1, and the number of epochs if it is known."""
    epochs = trainer.max_epochs
    return f"epoch {trainer.current_epoch + 1}{f'/{epochs}' if epochs is not None and epochs > 0 else ''}"


def format_seconds(seconds: float) -> str:
    """A duration as ``M:SS`` or ``H:MM:SS``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shown_metrics(trainer: Trainer) -> list[str]:
    """Names of the metrics that the module logs, losses and accuracies first."""
    names = [name for name in latest_metrics(trainer) if not name.startswith(("rate/", "optim/")) and name not in _PLACES]
    return sorted(names, key=lambda name: "loss" not in name and "acc" not in name)


_PLACES = ("epoch", "step", METRICS_ROW)


def _format_metrics(trainer: Trainer, names: list[str]) -> list[str]:
    latest, more = latest_metrics(trainer), len(names) - _SHOWN_METRICS
    shown = [f"{name} {latest[name]:.4g}" for name in names[:_SHOWN_METRICS]]
    return [*shown, f"{more} more in metrics.csv"] if more > 0 else shown


def latest_metrics(trainer: Trainer) -> dict[str, float]:
    """The latest value of each metric, as a number; those in ``trainer.logged_metrics`` are still on the device."""
    logger = run_logger(trainer)
    return {} if logger is None else logger.metrics.latest
