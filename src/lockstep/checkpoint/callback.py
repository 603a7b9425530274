"""Decide after each step whether to save and whether to stop, and remember which checkpoints score best."""

import logging
import math
import signal
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lockstep.checkpoint.manifest import Progress
from lockstep.checkpoint.rank_state import capture_state
from lockstep.checkpoint.reader import MODEL_FILE
from lockstep.checkpoint.serialization import check_loadable, to_plain_types
from lockstep.checkpoint.writer import CheckpointWriter
from lockstep.compat.lightning import dump_checkpoint, is_training_done
from lockstep.config import CheckpointOptions
from lockstep.core import Stopped, atomic_write_json, read_json
from lockstep.distributed import SignalReceiver, StopConsensus, allocation_end_time
from lockstep.monitoring import CsvMetricsLogger, ThroughputMonitor
from lockstep.runs import Run
from lockstep.strategies import LockstepStrategy

log = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 10.0
"""Time that a stop takes besides its save: to reach consensus, to close W&B and to be requeued."""

_RETRY_MINUTES = 1.0
"""Time after which a failed save is repeated."""


class CheckpointCallback(Callback):
    """Saves and stops, together with all other ranks; without a ``writer`` it only stops.

    Attributes:
        seconds_lost: Time lost to restarts: from each checkpoint to the first step after it.
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
        self.seconds_lost = 0.0
        self._consensus: StopConsensus | None = None
        self._saved_step, self._saved_any = -1, False
        self._saved_at = time.monotonic()
        self._previous_save: float | None = None
        self._scores_file = run.checkpoints / "scores.json"
        self._scores = self._read_scores()
        self._allocation_end = allocation_end_time()

    def resume(self, progress: Progress) -> None:
        """Continue the accounting of the same run from ``progress``."""
        self.seconds_lost, self._previous_save = progress.lost_seconds, progress.saved_at

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._previous_save is not None:
            self.seconds_lost += time.time() - self._previous_save
            self._previous_save = None
        capture_state(trainer)  # Fail now instead of at the first save if a private name is missing.
        self.trainer = trainer
        assert isinstance(trainer.strategy, LockstepStrategy)
        self._consensus = StopConsensus(trainer.strategy.sharding.world)
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_step_boundary(self, validation_follows: bool) -> None:
        """Save or stop if it is time to; called after each optimizer step, before the validation that may follow."""
        trainer, consensus = self.trainer, self._consensus
        assert trainer is not None and consensus is not None
        decision = consensus.poll(self._stop_signal(trainer), self._wants_to_save(trainer))
        step, every = trainer.global_step, self.options.every_n_steps
        due = validation_follows or decision.save or decision.stop or (every and step % every == 0) or _is_last_step(trainer)
        if due and step != self._saved_step:
            self.save(trainer)
        if decision.stop:
            if self.writer is not None:
                self.writer.wait_until_finished(consensus)
            trainer.strategy.barrier("stop")
            raise Stopped(decision.stop, step, together=True)

    def save(self, trainer: Trainer) -> None:
        """Save the current state; every rank must call."""
        if self.writer is None:
            return
        strategy, rank, is_rank_zero = trainer.strategy, trainer.global_rank, trainer.is_global_zero
        assert self._consensus is not None and isinstance(strategy, LockstepStrategy)
        checkpoint = dump_checkpoint(trainer)  # with ZeRO every rank takes part
        parts: dict[str, Any] = {f"rank-{rank}.pt": capture_state(trainer)}
        if (shards := strategy.shards()) is not None:
            parts[f"shard-{rank}.pt"] = shards
        if is_rank_zero:
            checkpoint["hyper_parameters"] = to_plain_types(checkpoint.get("hyper_parameters", {}))
            parts[MODEL_FILE] = checkpoint
        metrics = next((logger for logger in trainer.loggers if isinstance(logger, CsvMetricsLogger)), None)
        progress = Progress(
            step=trainer.global_step,
            epoch=_completed_epochs(trainer),
            batch=trainer.fit_loop.epoch_loop.batch_progress.current.completed,
            metric_rows=metrics.row_count if metrics else 0,
            train_seconds=self.throughput.train_seconds,
            lost_seconds=self.seconds_lost,
            saved_at=time.time(),
            gradient_ready_order=strategy.gradient_ready_order,
        )
        is_flushed = metrics is None or not is_rank_zero or metrics.flush()
        known_error = "" if is_flushed else f"{self.run.metrics.name} could not be written before"
        if not self._saved_any:
            for part in parts.values():
                check_loadable(part)
            self._saved_any = True
        self.writer.protected_steps = self._best_steps()
        self.writer.save(progress, parts, self._consensus, known_error)
        self._saved_step, self._saved_at = progress.step, time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._raise_if_signalled(trainer)
        if (monitor := self.options.monitor) is None or not trainer.is_global_zero or trainer.global_step != self._saved_step:
            return
        value = trainer.callback_metrics.get(monitor)
        if value is None:
            names = ", ".join(sorted(trainer.callback_metrics)) or "none"
            log.warning("checkpoint.monitor: %r is not logged, so this checkpoint has no score; logged: %s.", monitor, names)
        elif math.isfinite(value):
            self._scores[trainer.global_step] = float(value)
            try:
                atomic_write_json(self._scores_file, {str(step): score for step, score in self._scores.items()})
            except OSError as error:
                log.warning("%s could not be written (%s)", self._scores_file, error.strerror)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._consensus is not None:
            if self.writer is not None:
                self.writer.wait_until_finished(self._consensus)
            self._consensus.close()

    def _raise_if_signalled(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Stop without consensus: an evaluation has no state to save, and the step before it is saved."""
        if self.signals.received is not None:
            if self.writer is not None:
                self.writer.wait(_SHUTDOWN_SECONDS)
            raise Stopped(self.signals.received, trainer.global_step, together=False)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _raise_if_signalled

    def _stop_signal(self, trainer: Trainer) -> int:
        """Number of the signal for which this rank wants to stop; 0 for none."""
        if self.signals.received is not None:
            return int(self.signals.received)
        if self._allocation_end is not None and trainer.is_global_zero:
            save = self.writer.seconds if self.writer is not None else 0.0
            if time.time() > self._allocation_end - _SHUTDOWN_SECONDS - 2 * save:
                return int(signal.SIGUSR2)
        return 0

    def _wants_to_save(self, trainer: Trainer) -> bool:
        """Whether ``every_n_minutes`` have passed since the last save; rank zero decides."""
        if self.writer is None or not trainer.is_global_zero or self.writer.busy:
            return False
        minutes = math.inf if self.options.every_n_minutes is None else self.options.every_n_minutes
        return time.monotonic() - self._saved_at > 60 * (min(minutes, _RETRY_MINUTES) if self.writer.error else minutes)

    def _best_steps(self) -> set[int]:
        """Steps of the checkpoints with the best scores."""
        ranked = sorted(self._scores, key=lambda step: (self._scores[step], step), reverse=self.options.mode == "max")
        return set(ranked[: self.options.save_top_k] if self.options.monitor is not None else ())

    def _read_scores(self) -> dict[int, float]:
        """Scores of this run's checkpoints so far, by step."""
        try:
            return {int(step): float(score) for step, score in read_json(self._scores_file).items()}
        except (AttributeError, OSError, TypeError, ValueError) as error:
            log.warning("%s cannot be read (%s); scores so far are ignored", self._scores_file, error)
            return {}


def _is_last_step(trainer: Trainer) -> bool:
    """Whether training ends with this step."""
    loop = trainer.fit_loop
    assert loop.max_epochs is not None
    by_steps = loop.max_steps != -1 and trainer.global_step >= loop.max_steps
    by_epochs = loop.max_epochs != -1 and _completed_epochs(trainer) + 1 >= loop.max_epochs
    return is_training_done(trainer) and (by_steps or by_epochs)


def _completed_epochs(trainer: Trainer) -> int:
    """Epochs whose steps are all done."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)
