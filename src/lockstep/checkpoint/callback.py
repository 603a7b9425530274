"""At each boundary of two steps: save if it is time to, stop if the ranks have agreed to, and remember which were the best."""

import json
import logging
import math
import signal
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lockstep.checkpoint.rank_state import capture_state
from lockstep.checkpoint.reader import MODEL_FILE
from lockstep.checkpoint.serialization import check_loadable, to_plain_types
from lockstep.checkpoint.writer import CheckpointWriter
from lockstep.config import CheckpointOptions
from lockstep.core import Stopped, atomic_write_json
from lockstep.distributed import SignalReceiver, StopConsensus, allocation_end_time
from lockstep.monitoring import CsvMetricsLogger, ThroughputMonitor
from lockstep.runs import Run

log = logging.getLogger(__name__)


_SHUTDOWN_SECONDS = 10.0
"""What stopping takes beside a save: to agree, to close W&B, to be queued again."""


_RETRY_MINUTES = 1.0
"""How soon a save that failed is tried again."""


class CheckpointCallback(Callback):
    """Saves and stops, on every rank.

    Args:
        run: Whose checkpoints they are.
        options: When to save and what to keep.
        throughput: Knows how long training has taken.
        signals: What this rank was told.
        writer: Writes this rank's part; None saves nothing.

    Attributes:
        seconds_lost: Seconds that restarts have cost: from a checkpoint to the first step after it.
    """

    def __init__(
        self,
        run: Run,
        options: CheckpointOptions,
        throughput: ThroughputMonitor,
        signals: SignalReceiver,
        writer: CheckpointWriter | None,
    ) -> None:
        self.run, self.options, self.throughput, self.signals, self.writer = run, options, throughput, signals, writer
        self.trainer: Trainer | None = None
        self._agreement: StopConsensus | None = None
        self._saved, self._saved_any = -1, False
        self._saved_at = time.monotonic()
        self._scores: dict[int, float] = _read_scores(run)
        self._allocation_end = allocation_end_time()
        self.seconds_lost = 0.0
        self._left_at: float | None = None

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Count on from what a checkpoint of this run says."""
        self.seconds_lost, self._left_at = float(facts["lost"]), float(facts["left_at"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._left_at is not None:
            self.seconds_lost, self._left_at = self.seconds_lost + time.time() - self._left_at, None
        self.trainer = trainer
        strategy: Any = trainer.strategy
        self._agreement = StopConsensus(strategy.sharding.world)
        self._saved = trainer.global_step
        self._saved_at = time.monotonic()

    def on_step_boundary(self, validation_follows: bool) -> None:
        """After a step, before the validation that may follow."""
        trainer, agreement = self.trainer, self._agreement
        assert trainer is not None and agreement is not None
        agreed = agreement.poll(self._why_stop(trainer), self._wants_to_save(trainer))
        step, every = trainer.global_step, self.options.every_n_steps
        due = validation_follows or agreed.save or agreed.stop or (every and step % every == 0) or _is_last_step(trainer)
        if due and step != self._saved:
            self.save(trainer)
        if agreed.stop:
            if self.writer is not None:
                self.writer.wait_until_finished(self._reduce_max)
            trainer.strategy.barrier("stop")
            raise Stopped(agreed.stop, step, together=True)

    def save(self, trainer: Trainer) -> None:
        """Save what is now; every rank must call."""
        if self.writer is None:
            return
        strategy: Any = trainer.strategy
        step = trainer.global_step
        whole = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        parts: dict[str, Any] = {f"rank-{trainer.global_rank}.pt": capture_state(trainer)}
        if (shards := strategy.shards()) is not None:
            parts[f"shard-{trainer.global_rank}.pt"] = shards
        if trainer.is_global_zero:
            whole["hyper_parameters"] = to_plain_types(whole.get("hyper_parameters", {}))
            parts[MODEL_FILE] = whole
        facts = {
            "step": step,
            "epoch": _completed_epochs(trainer),
            "batch": trainer.fit_loop.epoch_loop.batch_progress.current.completed,
            "rows": _logged_rows(trainer),
            "ready": strategy.gradient_ready_order,
            "seconds": self.throughput.train_seconds,
            "lost": self.seconds_lost,
            "left_at": time.time(),
        }
        rows = [logger for logger in trainer.loggers if isinstance(logger, CsvMetricsLogger)] if trainer.is_global_zero else []
        known_error = "" if all(logger.flush() for logger in rows) else f"{self.run.metrics.name} could not be written before"
        self.writer.protected_steps = self._best()
        if not self._saved_any:
            for part in parts.values():
                check_loadable(part)
            self._saved_any = True
        self.writer.save(step, parts, facts, self._reduce_max, known_error)
        self._saved, self._saved_at = step, time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitor = self.options.monitor
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._raise_if_signalled(trainer)
        if monitor is None or not trainer.is_global_zero or trainer.global_step != self._saved:
            return
        value = trainer.callback_metrics.get(monitor)
        if value is None:
            names = ", ".join(sorted(trainer.callback_metrics)) or "none"
            log.warning(
                "checkpoint.monitor: %r is not logged, so no checkpoint is better than another; logged: %s.", monitor, names
            )
        elif math.isfinite(value):
            self._scores[trainer.global_step] = float(value)
            try:
                atomic_write_json(
                    self.run.checkpoints / "scores.json", {str(step): score for step, score in self._scores.items()}
                )
            except OSError as error:
                log.warning("the scores of checkpoints could not be written (%s)", error.strerror)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._raise_if_signalled(trainer)

    def on_test_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._raise_if_signalled(trainer)

    on_predict_batch_start = on_test_batch_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._agreement is not None:
            if self.writer is not None:
                self.writer.wait_until_finished(self._reduce_max)
            self._agreement.close()

    def _raise_if_signalled(self, trainer: Trainer) -> None:
        """In an evaluation there is nothing to save, and so nothing to agree on: the boundary before it is saved."""
        if self.signals.received is not None:
            if self.writer is not None:
                self.writer.wait(_SHUTDOWN_SECONDS)
            raise Stopped(self.signals.received, trainer.global_step, together=False)

    def _reduce_max(self, number: int) -> int:
        """What ``Writer.wait_until_finished`` needs."""
        assert self._agreement is not None and self.writer is not None
        return self._agreement.reduce_max(number, self.writer.on_wait)

    def _why_stop(self, trainer: Trainer) -> int:
        if self.signals.received is not None:
            return int(self.signals.received)
        if self._allocation_end is not None and trainer.is_global_zero:
            save = self.writer.seconds if self.writer is not None else 0.0
            if time.time() > self._allocation_end - _SHUTDOWN_SECONDS - 2 * save:
                return int(signal.SIGUSR2)
        return 0

    def _wants_to_save(self, trainer: Trainer) -> bool:
        if self.writer is None or not trainer.is_global_zero or self.writer.busy:
            return False
        minutes = math.inf if self.options.every_n_minutes is None else self.options.every_n_minutes
        return time.monotonic() - self._saved_at > 60 * (min(minutes, _RETRY_MINUTES) if self.writer.error else minutes)

    def _best(self) -> set[int]:
        """Steps of the checkpoints with the best scores."""
        if self.options.monitor is None:
            return set()
        ranked = sorted(self._scores, key=lambda step: (self._scores[step], step), reverse=self.options.mode == "max")
        return set(ranked[: self.options.save_top_k])


def _is_last_step(trainer: Trainer) -> bool:
    """Whether training ends with this step."""
    loop = trainer.fit_loop
    if not loop.epoch_loop._is_training_done:
        return False
    assert loop.max_epochs is not None
    by_steps = loop.max_steps != -1 and trainer.global_step >= loop.max_steps
    return by_steps or (loop.max_epochs != -1 and _completed_epochs(trainer) + 1 >= loop.max_epochs)


def _completed_epochs(trainer: Trainer) -> int:
    """Epochs whose steps are all done."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def _logged_rows(trainer: Trainer) -> int:
    """How many rows of metrics were logged."""
    return next((logger.row_count for logger in trainer.loggers if isinstance(logger, CsvMetricsLogger)), 0)


def _read_scores(run: Run) -> dict[int, float]:
    path = run.checkpoints / "scores.json"
    return {int(step): score for step, score in json.loads(path.read_text()).items()} if path.exists() else {}
