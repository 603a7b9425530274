"""lightning's training loops, with a boundary after each step at which the ranks may save, stop, and later go on.

What differs from lightning:

- A run goes on at the very boundary that was saved: after a step, before the validation that may follow it. lightning's own
  restarts repeat or skip steps, depending on where they were saved.
- No broadcast at each step. Since 2.5.2 every step of a world larger than one begins with one from rank zero and an
  ``.item()``: the host waits for the device each time. ``stop.Agreement`` takes its place.
- A clock on the wait for data.
"""

import time
from collections.abc import Callable

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call

from lockstep.checkpoint import restore_state
from lockstep.strategies import LockstepStrategy, ResumePoint


class EpochLoop(_TrainingEpochLoop):
    """An epoch with a boundary after each optimizer step.

    Attributes:
        on_step_boundary: Called after each optimizer step, before a validation, with whether one follows.
        pending: Whether the step before the boundary that was loaded is not ended yet.
        data_wait_seconds: Seconds that the host has spent waiting for the next batch so far.
    """

    on_step_boundary: Callable[[bool], None] | None = None
    pending = False
    data_wait_seconds = 0.0
    _fetch_began = 0.0

    @property
    def done(self) -> bool:
        return not self.pending and super().done

    def reset(self) -> None:
        if not self.pending:  # else all counters are where they were
            super().reset()

    def advance(self, data_fetcher: _DataFetcher) -> None:
        if self.pending:
            self.pending = False
            return
        super().advance(data_fetcher)
        if self.on_step_boundary is not None and not self._should_accumulate():
            self.on_step_boundary(self._should_check_val_fx(data_fetcher))

    def _on_before_fetch(self) -> None:
        self._fetch_began = time.perf_counter()
        super()._on_before_fetch()

    def _on_after_fetch(self) -> None:
        super()._on_after_fetch()
        self.data_wait_seconds += time.perf_counter() - self._fetch_began

    def _broadcast_sigterm_tensor(self) -> None:
        """Nothing."""


class FitLoop(_FitLoop):
    """A fit that can begin at a boundary.

    Attributes:
        resumed: Where it goes on; None begins at the beginning, or where a checkpoint of lightning's own says.
    """

    resume_point: ResumePoint | None = None
    epoch_loop: EpochLoop

    @property
    def done(self) -> bool:
        return not self.epoch_loop.pending and super().done

    def run(self) -> None:
        if self.resume_point is not None:
            # Not a restart in lightning's sense: nothing is to be guessed from the counters. Not by way of the fit loop's own
            # setter, for which a run that is measured in steps is always one.
            _Loop.restarting.fset(self, False)  # type: ignore[attr-defined]
            self.epoch_loop.pending = True
        super().run()

    def on_advance_start(self) -> None:
        resumed = self.resume_point
        if resumed is None:
            super().on_advance_start()
            return
        self.setup_data()
        assert self._combined_loader is not None
        for loader in self._combined_loader.flattened:
            _set_sampler_epoch(loader, resumed.position.epoch)
        # For whoever prepares something here; what is drawn, counted or logged by it is undone.
        call._call_callback_hooks(self.trainer, "on_train_epoch_start")
        call._call_lightning_module_hook(self.trainer, "on_train_epoch_start")
        restore_state(self.trainer, resumed.states, resumed.seed)
        assert isinstance(self.trainer.strategy, LockstepStrategy)
        self.trainer.strategy.finish_resume()
        self.resume_point = None


def replace_loops(trainer: Trainer) -> None:
    """Give ``trainer`` the loops of this module, with the limits that it has, and no signal handlers.

    Nor does it touch a loader before the strategy puts that in order: for predict, lightning would make it anew, with a batch
    sampler that notes what it draws.
    """
    old = trainer.fit_loop
    new = FitLoop(trainer, old.min_epochs, old.max_epochs)
    new.epoch_loop = EpochLoop(trainer, old.epoch_loop.min_steps, old.epoch_loop.max_steps)
    trainer.fit_loop = new
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer._data_connector._prepare_dataloader = lambda dataloader, shuffle, mode: dataloader  # type: ignore[method-assign]
