"""What a run says of itself while it trains: rates, a line or a bar, ``status.json``; and the guard against a NaN loss.

Nothing here waits for the device or for other ranks, except at the steps that are logged.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lockstep.compat.lightning import is_log_step
from lockstep.core import RunError

_NO_STEP = 2**62


class NanGuard(Callback):
    """Ends the run when a loss is not a number, before anything worse than the last good checkpoint is saved.

    Each step is checked on the device; the ranks compare at logged steps, at the end of an epoch and before a save.

    Raises:
        RunError: Names the first step and rank; on every rank alike.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            here = trainer.global_step * trainer.world_size + trainer.global_rank
            if self._first_bad is None:
                self._first_bad = torch.full((), _NO_STEP, device=loss.device)
            bad = ~torch.isfinite(loss.detach().mean())
            self._first_bad = torch.where(bad, self._first_bad.clamp(max=here), self._first_bad)
        if is_log_step(trainer):
            self.check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Compare all ranks; every rank must call."""
        if self._first_bad is None:
            return
        first = trainer.strategy.reduce(self._first_bad.clone(), reduce_op="min")
        if (value := int(first)) < _NO_STEP:
            step, rank = divmod(value, trainer.world_size)
            raise RunError(
                f"The loss is not a finite number at step {step} on rank {rank}. Checkpoints from before it are kept; "
                "try a smaller --model.lr, a longer warm-up or --trainer.gradient_clip_val 1."
            )
