"""Lightning's training loops with a boundary after each optimizer step, where ranks save, stop and resume.

Differences from Lightning:

- A run resumes at exactly the boundary that was saved: after a step, before the validation that may follow it. Lightning's
  own restarts repeat or skip steps, depending on where the checkpoint was saved.
- ``StopConsensus`` replaces the broadcast at each step, which would make the host wait for the device.
- With ``val_check_interval`` as a time, the clock of rank zero decides for all ranks.
- A clock measures how long the host waits for data.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lockstep.checkpoint import restore_state, undo_changes
from lockstep.compat.lightning import (
    LightningFitLoop,
    call_hooks,
    disable_signal_handlers,
    is_accumulating,
    keep_dataloaders,
    training_loader,
)
from lockstep.compat.lightning_epoch import DataFetcher, LightningEpochLoop
from lockstep.compat.lightning_hooks import call_hooks_fast
from lockstep.data.loading import TrainingLoader, choose_fetcher
from lockstep.distributed import StopConsensus
from lockstep.monitoring import run_logger
from lockstep.strategies import LockstepStrategy, ResumePoint


class EpochLoop(LightningEpochLoop):
    """The loop over the batches of an epoch, with a boundary after each optimizer step.

    Attributes:
        on_step_boundary: Called after each optimizer step and before validation, with whether a validation follows.
        on_should_stop: Called while ``Trainer.should_stop`` is set, with what has just ended; it may reset the flag.
        is_at_boundary: Whether the loop resumes at a boundary that it has not left yet.
        data_wait_seconds: Total seconds that the host has waited for the next batch.
    """

    on_step_boundary: Callable[[bool], None] | None = None
    on_should_stop: Callable[[str], None] | None = None
    is_at_boundary = False
    data_wait_seconds = 0.0
    _fetch_start = 0.0
    _validated_at: float | None = None
    _validations = 0
    _consensus: StopConsensus | None = None

    @property
    def done(self) -> bool:
        if self.trainer.should_stop and self.on_should_stop is not None:
            self.on_should_stop("batch")
        return not self.is_at_boundary and super().done

    def reset(self) -> None:
        if not self.is_at_boundary:  # the checkpoint has restored all counters
            super().reset()

    def advance(self, data_fetcher: DataFetcher) -> None:
        if self.is_at_boundary:
            self.is_at_boundary = False
            return
        super().advance(data_fetcher)
        if self.trainer.should_stop:
            self.settle_stop()
        if self.validation_interval is not None and not is_accumulating(self.trainer):
            self._decide_validation(self.validation_interval)
        if self.on_step_boundary is not None and (validates := self.validates_next(data_fetcher)) is not None:
            self.on_step_boundary(validates)

    def settle_stop(self) -> None:
        if self.on_should_stop is not None:
            self.on_should_stop("step")

    def on_run_start(self, data_fetcher: DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        if self._validated_at is None:
            self._validated_at = time.monotonic()

    def _decide_validation(self, interval: float) -> None:
        """Agree with all ranks whether a validation follows; every rank must call after each optimizer step."""
        if self._consensus is None:
            assert isinstance(self.trainer.strategy, LockstepStrategy)
            self._consensus = StopConsensus(self.trainer.strategy.sharding.world)
        is_time = self.trainer.is_global_zero and self.seconds_since_validation >= interval
        # A number, so that a request is not fulfilled twice: its answer comes some steps later.
        number = self._validations + 1
        self.validation_due = self._consensus.poll(number if is_time else 0, save=False).stop == number

    def after_validation(self) -> None:
        self.validation_due = False
        self._validations += 1
        self._validated_at = time.monotonic()

    @property
    def seconds_since_validation(self) -> float:
        return 0.0 if self._validated_at is None else time.monotonic() - self._validated_at

    def resume_validation(self, is_due: bool, seconds: float) -> None:
        """Restore how long ago the newest validation was, and whether the next one ``is_due`` now."""
        self.validation_due, self._validated_at = is_due, time.monotonic() - seconds

    def close(self) -> None:
        """Wait for pending collectives, which other ranks still need."""
        if self._consensus is not None:
            self._consensus.close()

    def before_fetch(self) -> None:
        self._fetch_start = time.perf_counter()

    def after_fetch(self) -> None:
        self.data_wait_seconds += time.perf_counter() - self._fetch_start


class FitLoop(LightningFitLoop):
    """The loop over epochs, which can start at a boundary.

    Attributes:
        resume_point: Where to resume; None starts at the beginning, or at the position in a Lightning checkpoint.
        on_resume: Called before training resumes, after all hooks of its start except those of the epoch.
        on_end: Called when the loop has ended, after all hooks of the end of training.
    """

    resume_point: ResumePoint | None = None
    _loaded_epochs: Sequence[int | None] = (None, None)  # those of the resume point
    on_resume: Callable[[Trainer], None] | None = None
    on_end: Callable[[], None] | None = None
    epoch_loop: EpochLoop

    @property
    def done(self) -> bool:
        if self.trainer.should_stop and self.epoch_loop.on_should_stop is not None:
            self.epoch_loop.on_should_stop("epoch")
        return not self.epoch_loop.is_at_boundary and super().done

    def run(self) -> None:
        if (point := self.resume_point) is not None:
            self.clear_restarting()  # a restart in Lightning's sense would derive the position from the counters
            self.epoch_loop.resume_validation(point.validation_due, point.seconds_since_validation)
            self._loaded_epochs = point.loaded_epochs
            self.epoch_loop.is_at_boundary = not point.has_ended
            if point.has_ended:  # continue with the next epoch, if the limits of the run allow one
                self._restore(point)
        super().run()
        if self.on_end is not None:
            self.on_end()

    def combine_loaders(self, request: Callable[[], Any]) -> CombinedLoader:
        strategy, point = self.trainer.strategy, self.resume_point
        assert isinstance(strategy, LockstepStrategy)
        with self._epoch_of_loading(self._loaded_epochs[0]):
            loaders = request()
        start = (point.positions, point.shared.get("streams", ())) if point else ()
        return TrainingLoader(loaders, strategy.sharding, lambda: self.trainer.current_epoch, *start)

    def choose_fetcher(self, fetcher: Any) -> Any:
        loader, _ = training_loader(self.trainer)
        return fetcher if loader is None else choose_fetcher(fetcher, self.trainer, loader.flattened)

    def setup_data(self) -> None:
        super().setup_data()
        train, val = self._loaded_epochs
        if train is not None:
            self.set_train_loaded_epoch(train)
            self._loaded_epochs = None, val

    def on_run_start(self) -> None:
        _, val = self._loaded_epochs
        if val is not None and self.trainer.val_dataloaders is None:
            self.trainer.validating = True
            with self._epoch_of_loading(val):
                self.epoch_loop.val_loop.setup_data()
            self.trainer.training = True
        super().on_run_start()

    @contextmanager
    def _epoch_of_loading(self, epoch: int | None) -> Iterator[None]:
        """Set the epoch that ``train_dataloader`` and ``val_dataloader`` see to that of their call before the restart."""
        progress: Any = self.epoch_progress.current
        current = progress.processed
        progress.processed = current if epoch is None else epoch
        try:
            yield
        finally:
            progress.processed = current

    def on_advance_start(self) -> None:
        point = self.resume_point
        if point is None:
            super().on_advance_start()
            return
        if self.on_resume is not None:
            self.on_resume(self.trainer)
        # Callbacks may allocate what they need here, or set up the data; what they train, draw, count or log is undone.
        with undo_changes(self.trainer, "on_train_epoch_start"):
            call_hooks(self.trainer, "on_train_epoch_start")
        if point.epoch > 0:  # except in the first epoch, workers start after these hooks, which may change the dataset
            self.restart_iteration()
        loader, _ = training_loader(self.trainer)
        if isinstance(loader, TrainingLoader) and (done := loader.batches_done()) is not None:
            self.set_completed_batches(done)
        self._restore(point)

    def _restore(self, point: ResumePoint) -> None:
        restore_state(self.trainer, point)
        if (logger := run_logger(self.trainer)) is not None:
            logger.finish_resume()
        self.resume_point = None

    def on_run_end(self) -> None:
        self.epoch_loop.close()
        super().on_run_end()


def replace_loops(trainer: Trainer) -> FitLoop:
    """Replace the loops of ``trainer``, but keep its limits; stop Lightning from handling signals and DataLoaders."""
    old = trainer.fit_loop
    new = FitLoop(trainer, old.min_epochs, old.max_epochs)
    new.epoch_loop = EpochLoop(trainer, old.epoch_loop.min_steps, old.epoch_loop.max_steps)
    trainer.fit_loop = new
    call_hooks_fast(trainer)
    disable_signal_handlers(trainer)
    keep_dataloaders(trainer)
    return new
