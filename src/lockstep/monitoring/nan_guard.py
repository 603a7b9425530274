"""The guard against a loss that is not finite."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lockstep.compat.lightning_epoch import is_log_step
from lockstep.core import RunError

_NEVER = 2**62

_UNCHECKED = 64
"""Number of losses that are checked together, unless a check is due before."""


class NanGuard(Callback):
    """End the run at a loss that is not finite, before a checkpoint with its effect is saved.

    Losses are checked on the device, without waiting for it. The ranks compare at logged steps, at the end of an epoch,
    before a validation and before a save.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []  # not checked yet; _keys are theirs
        self._keys: list[int] = []
        self._first_bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            loss = loss.detach()
            self._losses.append(loss.mean() if loss.ndim else loss.clone())  # copies: the module may write to its own
            self._keys.append(trainer.global_step * trainer.world_size + trainer.global_rank)  # orders by step, then by rank
            if len(self._losses) == _UNCHECKED:
                self._check_own()
        if is_log_step(trainer):
            self.check(trainer)

    def _check_own(self) -> None:
        """Check the losses of this rank on the device, without waiting for it."""
        device = self._losses[0].device if self._first_bad is None else self._first_bad.device
        losses = torch.stack([loss.to(device) for loss in self._losses])  # a module may compute some on another device
        keys = torch.tensor(self._keys, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        first = torch.where(torch.isfinite(losses), _NEVER, keys).min()
        self._first_bad = first if self._first_bad is None else torch.minimum(self._first_bad, first)
        self._losses, self._keys = [], []

    def check(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Raise on all ranks if the loss of any rank was not finite; every rank must call this.

        Raises:
            RunError: A loss was not finite; names its first step and rank.
        """
        if self._losses:
            self._check_own()
        if self._first_bad is None:
            return
        first = int(trainer.strategy.reduce(self._first_bad.clone(), reduce_op="min"))
        if first < _NEVER:
            step, rank = divmod(first, trainer.world_size)
            raise RunError(
                f"The loss is not a finite number at step {step} on rank {rank}. Earlier checkpoints are kept; "
                "try a smaller --model.lr, a longer warm-up or --trainer.gradient_clip_val 1."
            )

    on_train_epoch_end = on_validation_start = on_save_checkpoint = check
