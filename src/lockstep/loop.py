"""lightning's training epoch without its per-step broadcast, and with a clock on the wait for data.

Since 2.5.2 every step of a world larger than one begins with a broadcast from rank zero and an ``.item()``: the host waits
for the device each time. A signal ends the rank that it reaches, and the launcher ends the others.
"""

import time

from lightning.pytorch import Trainer
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
        if self.trainer.received_sigterm:
            raise SIGTERMException


def replace_epoch_loop(trainer: Trainer) -> None:
    """Give ``trainer`` the loop of this module, with the limits that it has."""
    old = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = EpochLoop(trainer, old.min_steps, old.max_steps)
