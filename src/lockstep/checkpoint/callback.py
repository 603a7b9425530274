"""Decide after each step whether to save and whether to stop, and remember which checkpoints score best."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lockstep.checkpoint.manifest import Progress
from lockstep.checkpoint.monitor import check_monitor
from lockstep.checkpoint.rank_state import capture_state
from lockstep.checkpoint.reader import MODEL_FILE, Checkpoint, published_checkpoints
from lockstep.checkpoint.serialization import check_loadable, check_states
from lockstep.checkpoint.weight_sums import check_ranks_agree, weight_sums
from lockstep.checkpoint.writer import SHUTDOWN_SECONDS, CheckpointWriter
from lockstep.compat.lightning import LightningFitLoop, dump_checkpoint, is_stopping, is_training_done
from lockstep.config import CheckpointOptions
from lockstep.core import RunError, SaveError, Stopped, atomic_write_json, read_json
from lockstep.data.loading import current_batch
from lockstep.distributed import SignalReceiver, StopConsensus, all_meet, allocation_end_time
from lockstep.monitoring import Stopwatch, run_logger
from lockstep.runs import Ownership, checkpoint_order
from lockstep.strategies import LockstepStrategy

log = logging.getLogger(__name__)

_SUPERSEDED = 128
"""Stop value, above every signal number: a newer attempt has claimed the run."""

_RETRY_MINUTES = 1.0
"""Minutes after which a failed save is retried."""

_END_PERIOD = 50
"""Optimizer steps between two exchanges of the step at which a rank wants to end training."""

_NEVER = 2**62


class CheckpointCallback(Callback):
    """Saves and stops, together with all other ranks; without a ``writer`` it only stops."""

    def __init__(
        self,
        ownership: Ownership,
        options: CheckpointOptions,
        stopwatch: Stopwatch,
        signals: SignalReceiver,
        writer: CheckpointWriter | None,
    ) -> None:
        self.run, self.ownership, self.options = ownership.run, ownership, options
        self.stopwatch, self.signals, self.writer = stopwatch, signals, writer
        self.trainer: Trainer | None = None
        self._consensus: StopConsensus | None = None
        self._boundary_step = self._saved_step = -1
        self._saved_sums: Tensor | None = None
        self._saved_at = time.monotonic()
        self._resumed: Progress | None = None
        self._scores_file = self.run.checkpoints / "scores.json"
        self._allocation_end = allocation_end_time()
        self._ends = self._has_validated = False
        self._end_step = _NEVER  # after which training ends, as far as this rank knows

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue the same run from its ``checkpoint``."""
        self._resumed = checkpoint.manifest.progress
        self._end_step = _NEVER if self._resumed.end_step is None else self._resumed.end_step
        self.stopwatch.resume(self._resumed.seconds, self._resumed.saved_at)
        if self.writer is not None:
            self.writer.published = checkpoint.folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.trainer = trainer
            self._consensus = StopConsensus(self._strategy.sharding.world)
            if self.writer is not None and trainer.is_global_zero:
                self.writer.remove_debris()
                self._read_scores(self.writer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.writer is not None:
            check_states(trainer)
        capture_state(trainer)  # Fail now instead of at the first save if a private name is missing.
        self._boundary_step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        if self.writer is not None and self._resumed is not None:
            self._saved_sums = self._weight_sums()

    def on_step_boundary(self, validation_follows: bool) -> None:
        """Save or stop if it is time to; called after each optimizer step, before the validation that may follow."""
        trainer, consensus = self.trainer, self._consensus
        assert trainer is not None and consensus is not None
        decision = consensus.poll(self._stop_signal(trainer), self._wants_to_save(trainer))
        if decision.stop == _SUPERSEDED:
            raise self.run.superseded(self.ownership.attempt)
        step, every = trainer.global_step, self.options.every_n_steps
        # Several optimizers may step in one batch, and so skip the multiple.
        is_multiple = every is not None and step // every > self._boundary_step // every
        if step // _END_PERIOD > self._boundary_step // _END_PERIOD:
            self._end_step = consensus.exchange_min(self._end_step)
            if self._end_step <= step:
                trainer.should_stop = self._ends = True
        self._boundary_step = step
        is_last = _is_last_step(trainer) or is_stopping(trainer)
        with self._stops_if_signalled(trainer):
            if step != self._saved_step and (validation_follows or decision.save or decision.stop or is_multiple or is_last):
                self.save(trainer)
            if decision.stop and self.writer is not None:
                self.writer.wait_until_finished(consensus)
        if decision.stop:
            trainer.strategy.barrier("stop")
            raise Stopped(decision.stop, step, together=True)

    def settle_stop(self, place: str) -> None:
        """Keep ``Trainer.should_stop`` if all ranks have set it at this ``place`` in the loops.

        Otherwise all ranks continue to the second multiple of 50 steps from here: they exchange the end step at the first
        multiple, so that all know it at the second. Neither a restart nor another rank that sets it meanwhile changes the last
        step.
        """
        trainer = self.trainer
        assert trainer is not None
        if self._ends or not is_stopping(trainer) or trainer.global_step >= self._end_step:
            return
        if self._end_step != _NEVER:
            trainer.should_stop = False
            return
        loop = trainer.fit_loop.epoch_loop
        point = f"the stop after step {trainer.global_step} ({place}, batch {loop.batch_idx} of epoch {trainer.current_epoch})"
        self._ends = all_meet(point, self._strategy.sharding.world)
        if not self._ends:
            trainer.should_stop, self._end_step = False, (self._boundary_step // _END_PERIOD + 2) * _END_PERIOD
            text = "should_stop is set on rank %d, but not on all ranks; training ends on all of them after step %d"
            log.warning(text, trainer.global_rank, self._end_step)

    def on_fit_loop_end(self) -> None:
        """Publish the final weights, after all hooks that may change them, unless a checkpoint already holds them.

        Raises:
            SaveError: They cannot be saved.
            RunError: A hook has changed the weights after their save, and the strategy cannot save such changes.
        """
        trainer, consensus, writer = self.trainer, self._consensus, self.writer
        assert trainer is not None and consensus is not None
        if writer is None or (self._resumed is not None and self._resumed.has_ended and not self._has_trained(trainer)):
            return
        with self._stops_if_signalled(trainer):
            writer.wait_until_finished(consensus)
            is_published = writer.published is not None and checkpoint_order(writer.published)[0] == trainer.global_step
            sums = self._weight_sums()
            has_changed = self._saved_sums is None or not torch.equal(self._saved_sums, sums)
            is_partitioned = self._strategy.is_partitioned
            for _ in range(2):
                if not consensus.reduce_max(int(trainer.is_global_zero and (has_changed or not is_published))):
                    return
                if is_partitioned and consensus.reduce_max(int(trainer.is_global_zero and has_changed and is_published)):
                    raise RunError(
                        "A hook has changed the weights after the last step (on_train_end of the module or of a callback), but "
                        "ZeRO saves the weights that its optimizer holds; use strategy ddp."
                    )
                self.save(trainer, has_ended=True)
                writer.wait_until_finished(consensus)
                is_published = writer.published is not None and checkpoint_order(writer.published) == (trainer.global_step, 1)
                has_changed = False
            if not consensus.reduce_max(int(trainer.is_global_zero and not is_published)):
                return
        raise SaveError(
            f"Training has ended, but its weights are not saved: {writer.error or 'the log of rank 0 says why'}. Make room in "
            f"{self.run.checkpoints} and resume the run."
        )

    def save(self, trainer: Trainer, has_ended: bool = False) -> None:
        """Save the current state, after training if it ``has_ended``; every rank must call.

        Raises:
            RunError: The ranks have different weights.
            SaveError: The previous save hangs.
        """
        if self.writer is None:
            return
        strategy, rank, is_rank_zero = self._strategy, trainer.global_rank, trainer.is_global_zero
        loop, batch = trainer.fit_loop, current_batch(trainer)
        assert self._consensus is not None and isinstance(loop, LightningFitLoop)
        self._end_step = -self._consensus.reduce_max(-self._end_step)
        check_ranks_agree(dict(strategy.replicated_weights()), self._consensus, trainer.global_step, max(0, self._saved_step))
        checkpoint = dump_checkpoint(trainer)  # with ZeRO every rank takes part
        self._saved_sums = self._weight_sums()
        parts: dict[str, Any] = {f"rank-{rank}.pt": capture_state(trainer), **strategy.shards()}
        if is_rank_zero:
            parts[MODEL_FILE] = checkpoint
        logger, seconds = run_logger(trainer), self.stopwatch.seconds()
        progress = Progress(
            step=trainer.global_step,
            epoch=_completed_epochs(trainer),
            batch=loop.epoch_loop.batch_progress.current.completed,
            positions=[list(astuple(position)) for position in batch.positions] if batch else [],
            loaded_epochs=loop.loaded_epochs,
            validation_due=loop.epoch_loop.validation_due,
            seconds_since_validation=loop.epoch_loop.seconds_since_validation,
            metric_rows=logger.metrics.row_count if logger else 0,
            train_seconds=seconds.pop("training", 0.0),
            lost_seconds=seconds.pop("lost", 0.0),
            saved_at=time.time(),
            gradient_ready_order=strategy.gradient_ready_order,
            should_stop=bool(self._consensus.reduce_max(trainer.should_stop)),
            end_step=None if self._end_step == _NEVER else self._end_step,
            has_ended=has_ended,
            wandb_position=list(logger.position()) if logger else [0, {}],
            other_seconds=seconds,
        )
        is_flushed = logger is None or not is_rank_zero or logger.metrics.flush()
        known_error = "" if is_flushed else f"{self.run.metrics.name} could not be written"
        for part in parts.values():
            check_loadable(part)
        self.writer.wait_until_finished(self._consensus)
        if logger is not None:
            self.writer.before_publication = logger.flush_before_publication()
        self.writer.save(progress, parts, self._consensus, known_error, in_background=not strategy.is_on_disk)
        self._saved_step, self._saved_at = progress.step, time.monotonic()

    def joins_all_ranks(self, seconds: float) -> bool:
        """Whether all ranks call this within ``seconds``."""
        assert self._consensus is not None
        deadline = time.monotonic() + seconds

        def check_deadline() -> None:
            if time.monotonic() > deadline:
                raise TimeoutError

        try:
            self._consensus.reduce_max(0, check_deadline)
            return True
        except (TimeoutError, RuntimeError):  # another rank continues, or has exited
            return False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._raise_if_signalled(trainer)
        monitor, is_saved = self.options.monitor, trainer.global_step == self._saved_step and self.writer is not None
        if monitor is None or not trainer.is_global_zero or not is_saved:
            return
        assert self.writer is not None
        value = trainer.callback_metrics.get(monitor)
        if value is None:
            if not self._has_validated:
                try:
                    check_monitor(monitor, trainer, pl_module)
                except RunError:
                    self.writer.wait(SHUTDOWN_SECONDS)  # a resume needs the checkpoint of this step
                    raise
        elif math.isfinite(value):
            self.writer.scores[trainer.global_step] = float(value)
            self.ownership.check_now()
            try:
                atomic_write_json(self._scores_file, {str(step): score for step, score in self.writer.scores.items()})
            except OSError as error:
                log.warning("%s could not be written (%s)", self._scores_file, error.strerror)
        self._has_validated = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._consensus is not None:
            self._consensus.close()

    def _raise_if_signalled(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Stop without consensus: an evaluation has no state to save, and the step before it is saved."""
        received = self.signals.received
        may_stop = self.writer is not None and trainer.global_step > 0  # not twice in one evaluation, which may be too long
        if received is None and may_stop and self._has_trained(trainer) and self._is_out_of_time():
            received = signal.SIGUSR2
        if received is not None:
            if self.writer is not None:
                self.writer.wait(SHUTDOWN_SECONDS)
            raise Stopped(received, trainer.global_step, together=False)
        if trainer.is_global_zero:
            self.ownership.check()

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _raise_if_signalled

    def _stop_signal(self, trainer: Trainer) -> int:
        """Number of the signal for which this rank wants to stop, or _SUPERSEDED; 0 for neither."""
        if trainer.is_global_zero and self.ownership.is_lost():
            return _SUPERSEDED
        late = signal.SIGUSR2 if trainer.is_global_zero and self._is_out_of_time() else 0
        return int(self.signals.received or late)

    def _is_out_of_time(self) -> bool:
        """Whether the allocation ends before much more than a save."""
        save = self.writer.seconds if self.writer is not None else 0.0
        return self._allocation_end is not None and time.time() > self._allocation_end - SHUTDOWN_SECONDS - 2 * save

    def _wants_to_save(self, trainer: Trainer) -> bool:
        """Whether ``every_n_minutes`` have passed since the last save; rank zero decides."""
        if self.writer is None or not trainer.is_global_zero or (self.writer.busy and not self.writer.is_hung):
            return False
        minutes = math.inf if self.options.every_n_minutes is None else self.options.every_n_minutes
        return time.monotonic() - self._saved_at > 60 * (min(minutes, _RETRY_MINUTES) if self.writer.error else minutes)

    @property
    def _strategy(self) -> LockstepStrategy:
        assert self.trainer is not None and isinstance(self.trainer.strategy, LockstepStrategy)
        return self.trainer.strategy

    def _has_trained(self, trainer: Trainer) -> bool:
        """Whether this attempt has done a step."""
        return self._resumed is None or trainer.global_step != self._resumed.step

    def _weight_sums(self) -> Tensor:
        """Checksums of the weights in Lightning's checkpoint, and of replicated weights that ZeRO saves in shards."""
        strategy = self._strategy
        return weight_sums({**dict(strategy.replicated_weights()), **strategy.lightning_module_state_dict()}.values())

    @contextmanager
    def _stops_if_signalled(self, trainer: Trainer) -> Iterator[None]:
        """After a stop signal, stop even if a save hangs."""
        try:
            yield
        except SaveError as error:
            if self.signals.received is None:
                raise
            log.error("%s", error.message)
            raise Stopped(self.signals.received, trainer.global_step, together=False) from error

    def _read_scores(self, writer: CheckpointWriter) -> None:
        """Read the scores of this run's checkpoints so far; if they cannot be read, keep these checkpoints."""
        try:
            writer.scores = {int(step): float(score) for step, score in read_json(self._scores_file).items()}
        except (AttributeError, OSError, TypeError, ValueError) as error:
            log.warning("%s is damaged (%s); all checkpoints so far are kept", self._scores_file, error)
            writer.protected = {path.name for path in published_checkpoints(self.run.checkpoints)}


def _is_last_step(trainer: Trainer) -> bool:
    """Whether training ends with this step."""
    loop = trainer.fit_loop
    assert loop.max_epochs is not None
    by_steps = loop.max_steps != -1 and trainer.global_step >= loop.max_steps
    by_epochs = loop.max_epochs != -1 and _completed_epochs(trainer) + 1 >= loop.max_epochs
    return is_training_done(trainer) and (by_steps or by_epochs)


def _completed_epochs(trainer: Trainer) -> int:
    """Epochs whose steps are all done."""
    return int(vars(trainer.fit_loop.epoch_progress.current)["processed"])
