"""The progress of a run on the last line of a terminal."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lockstep.core import LiveLine
from lockstep.monitoring.status import StatusReporter, format_epoch

_INTERVAL_SECONDS = 0.2
"""Time between two updates."""


class ProgressLine(Callback):
    """Show the progress that ``reporter`` describes, or that of an evaluation, on rank zero."""

    def __init__(self, reporter: StatusReporter) -> None:
        self._reporter, self._line = reporter, LiveLine()
        self._next_update = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self._line.open()

    def _close(self, *_: Any, **__: Any) -> None:
        self._line.close()

    teardown = on_exception = _close

    def _is_due(self) -> bool:
        if (now := time.monotonic()) < self._next_update:
            return False
        self._next_update = now + _INTERVAL_SECONDS
        return True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due():
            self._line.show(self._reporter.describe(trainer))

    def _show_evaluation(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self._is_due():
            return
        assert trainer.state.stage is not None
        name, attribute = _STAGES[trainer.state.stage.value]
        batches = getattr(trainer, attribute)
        total = batches[dataloader_idx] if dataloader_idx < len(batches) else float("inf")
        place = [format_epoch(trainer), self._reporter.format_step(trainer)] if trainer.state.fn == "fit" else []
        of_all = f"/{total:.0f}" if total != float("inf") else ""
        self._line.show([*place, f"{name}, batch {batch_idx + 1}{of_all}"])

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _show_evaluation


_STAGES = {
    "sanity_check": ("sanity check", "num_sanity_val_batches"),
    "validate": ("validation", "num_val_batches"),
    "test": ("test", "num_test_batches"),
    "predict": ("prediction", "num_predict_batches"),
}
"""Stages of Lightning in words, and the attributes of its Trainer that hold the number of batches of each loader."""
