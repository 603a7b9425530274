"""lightning's training epoch without its per-step broadcast, and with a clock on the wait for data.

Since 2.5.2 every step of a world larger than one begins with a broadcast from rank zero and an ``.item()``: the host waits
for the device each time. Its SIGTERM handler broadcasts too, from inside the handler. Both go: here the handler sets a flag and
does nothing else, the rank leaves before its next batch, and the launcher ends the others.
"""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import SIGTERMException


class EpochLoop(_TrainingEpochLoop):
    """An epoch whose steps begin without talking to the other ranks.

    Attributes:
        waited: Seconds that the host has spent waiting for the next batch so far.
    """

    waited = 0.0
    _fetch_began = 0.0

    def _on_before_fetch(self) -> None:
        self._fetch_began = time.perf_counter()
        super()._on_before_fetch()

    def _on_after_fetch(self) -> None:
        super()._on_after_fetch()
        self.waited += time.perf_counter() - self._fetch_began

    def _broadcast_sigterm_tensor(self) -> None:
        """Nothing; ``LeaveOnSigterm`` takes its place."""


class LeaveOnSigterm(Callback):
    """Ends this rank before its next batch once it has been sent SIGTERM.

    Raises:
        SIGTERMException: As lightning does.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._leave(trainer)

    def on_test_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._leave(trainer)

    @staticmethod
    def _leave(trainer: Trainer) -> None:
        if trainer.received_sigterm:
            raise SIGTERMException


def replace_epoch_loop(trainer: Trainer) -> None:
    """Give ``trainer`` the loop of this module, with the limits that it has, and a SIGTERM handler that goes with it."""
    signals = trainer._signal_connector

    def note(*_: Any) -> None:
        signals.received_sigterm = True

    signals._sigterm_notifier_fn = note  # type: ignore[assignment]
    old = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = EpochLoop(trainer, old.min_steps, old.max_steps)
