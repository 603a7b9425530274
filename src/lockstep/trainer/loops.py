"""Lightning's training loops with a boundary after each optimizer step, where ranks save, stop and resume.

Differences from Lightning:

- A run resumes at exactly the boundary that was saved: after a step, before the validation that may follow it. Lightning's
  own restarts repeat or skip steps, depending on where they were saved.
- No broadcast at each step, for which the host would wait for the device. ``StopConsensus`` takes its place.
- A clock measures how long the host waits for data.
"""

import time
from collections.abc import Callable

from lightning.pytorch import Trainer

from lockstep.checkpoint import restore_state
from lockstep.compat.lightning import (
    DataFetcher,
    LightningEpochLoop,
    LightningFitLoop,
    call_hooks,
    disable_signal_handlers,
    keep_dataloaders,
    set_sampler_epoch,
)
from lockstep.strategies import LockstepStrategy, ResumePoint


class EpochLoop(LightningEpochLoop):
    """The loop over the batches of an epoch, with a boundary after each optimizer step.

    Attributes:
        on_step_boundary: Called after each optimizer step and before validation, with whether a validation follows.
        is_at_boundary: Whether the loop resumes at a boundary that it has not left yet.
        data_wait_seconds: Total seconds that the host has waited for the next batch.
    """

    on_step_boundary: Callable[[bool], None] | None = None
    is_at_boundary = False
    data_wait_seconds = 0.0
    _fetch_start = 0.0

    @property
    def done(self) -> bool:
        return not self.is_at_boundary and super().done

    def reset(self) -> None:
        if not self.is_at_boundary:  # the checkpoint has restored all counters
            super().reset()

    def advance(self, data_fetcher: DataFetcher) -> None:
        if self.is_at_boundary:
            self.is_at_boundary = False
            return
        super().advance(data_fetcher)
        if self.on_step_boundary is not None and (validates := self.validates_next(data_fetcher)) is not None:
            self.on_step_boundary(validates)

    def before_fetch(self) -> None:
        self._fetch_start = time.perf_counter()

    def after_fetch(self) -> None:
        self.data_wait_seconds += time.perf_counter() - self._fetch_start


class FitLoop(LightningFitLoop):
    """The loop over epochs, which can start at a boundary.

    Attributes:
        resume_point: Where to resume; None starts at the beginning, or where a checkpoint of Lightning's says.
        on_end: Called when the loop has ended, and all hooks of the end of training have run.
    """

    resume_point: ResumePoint | None = None
    on_end: Callable[[], None] | None = None
    epoch_loop: EpochLoop

    @property
    def done(self) -> bool:
        return not self.epoch_loop.is_at_boundary and super().done

    def run(self) -> None:
        if (point := self.resume_point) is not None:
            self.clear_restarting()  # a restart in Lightning's sense would derive the position from the counters
            self.epoch_loop.is_at_boundary = not point.has_ended
            if point.has_ended:  # go on with the next epoch, if the limits of the run allow one
                self._restore(point)
        super().run()
        if self.on_end is not None:
            self.on_end()

    def on_advance_start(self) -> None:
        point = self.resume_point
        if point is None:
            super().on_advance_start()
            return
        self.setup_data()
        for loader in self.train_loaders:
            set_sampler_epoch(loader, point.position.epoch)
        # Callbacks may allocate what they need here; the restored state undoes what they draw, count or log.
        call_hooks(self.trainer, "on_train_epoch_start")
        self._restore(point)

    def _restore(self, point: ResumePoint) -> None:
        restore_state(self.trainer, point)
        assert isinstance(self.trainer.strategy, LockstepStrategy)
        self.trainer.strategy.finish_resume()
        self.resume_point = None


def replace_loops(trainer: Trainer) -> FitLoop:
    """Replace the loops of ``trainer``, keeping its limits; leave signals and DataLoaders to lockstep. Return the new loop."""
    old = trainer.fit_loop
    new = FitLoop(trainer, old.min_epochs, old.max_epochs)
    new.epoch_loop = EpochLoop(trainer, old.epoch_loop.min_steps, old.epoch_loop.max_steps)
    trainer.fit_loop = new
    disable_signal_handlers(trainer)
    keep_dataloaders(trainer)
    return new
