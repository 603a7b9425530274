"""A callback that logs to W&B in the ways that user code does."""

from typing import Any

import numpy as np
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer


class WandbCalls(Callback):
    """Logs an image at every step, beside rows by other means.

    Args:
        tables: Also log tables, which need a server with artifacts.
        explicit_step: Also log rows with ``step=``, as many do: the number of the batch.
    """

    def __init__(self, tables: bool = False, explicit_step: bool = False) -> None:
        self.tables, self.explicit_step = tables, explicit_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.tables:
            self._logger(trainer).log_text("start", columns=["text"], data=[["once"]])
        self._logger(trainer).log_metrics({"start/value": 1.0})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        picture = np.full((4, 4, 3), trainer.global_step % 256, dtype=np.uint8)
        self._logger(trainer).log_image("image", [picture], step=trainer.global_step)
        if trainer.global_step % 3 == 0:
            self._logger(trainer).experiment.log({"third": trainer.global_step})
        if trainer.global_step % 4 == 0:
            self._logger(trainer).log_metrics({"fourth": float(outputs["loss"])}, step=trainer.global_step)
        if trainer.is_global_zero:
            wandb.log({"part": trainer.global_step}, commit=False)
            if self.explicit_step:
                wandb.log({"explicit": trainer.global_step}, step=trainer.global_step)
                wandb.log({"late": trainer.global_step}, step=1)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.tables:
            self._logger(trainer).log_table("table", columns=["step"], data=[[trainer.global_step]])

    def _logger(self, trainer: Trainer) -> Any:
        return trainer.logger
