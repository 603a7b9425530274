"""Throughput, waiting time for data, learning rate and gradient norm."""

import logging
import time
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.optim import Optimizer

from lockstep.compat.lightning import is_accumulating
from lockstep.compat.lightning_epoch import is_log_step
from lockstep.data.loading import current_batch, preparation_times
from lockstep.monitoring.data_wait import DataWaitAdvisor, InputTimes

log = logging.getLogger(__name__)


class ThroughputMonitor(Callback):
    """Log speed, share of time spent waiting for data, learning rate and gradient norm at every logged step.

    If the share stays above a tenth for a minute, a line on rank zero names the bottleneck.

    ``rate/samples_per_second`` counts the samples of all ranks. ``rate/step_ms`` is the time of a step of all optimizers.
    ``rate/data_wait`` is the share of that time, from 0 to 1, in which the host waited for the next batch. These three cover
    the steps since the last logged one, without validation. ``optim/lr`` is the learning rate of the first parameter group,
    ``optim/grad_norm`` the total 2-norm of the gradient before clipping.

    Attributes:
        samples_per_second, data_wait: The latest values; 0 and None before the first.
    """

    def __init__(self) -> None:
        self.samples_per_second = 0.0
        self.data_wait: float | None = None
        self._advisor = DataWaitAdvisor()
        self._times_before = InputTimes()
        self._grad_norm: Tensor | None = None
        self._started_at = 0.0  # 0 while the clock is stopped
        self._samples = self._steps = 0
        self._elapsed = self._waited_before = 0.0

    def _start_clock(self, *_: Any, **__: Any) -> None:
        self._started_at = time.perf_counter()

    def _stop_clock(self, *_: Any, **__: Any) -> None:
        if self._started_at:
            self._elapsed += time.perf_counter() - self._started_at
            self._started_at = 0.0

    on_train_epoch_start = on_validation_end = _start_clock
    on_validation_start = on_train_epoch_end = _stop_clock

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if is_log_step(trainer) and optimizer.param_groups:  # empty if configure_optimizers returns None
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(gradients) if gradients else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += _global_sample_count(trainer, batch)
        if is_accumulating(trainer):
            return
        self._steps += 1
        if not is_log_step(trainer):
            return
        self._stop_clock()
        self._start_clock()
        elapsed = max(self._elapsed, 1e-9)
        waited = trainer.fit_loop.epoch_loop.data_wait_seconds - self._waited_before
        self.samples_per_second = self._samples / elapsed
        self.data_wait = min(1.0, waited / elapsed)
        if trainer.is_global_zero:
            self._advise(trainer, elapsed, waited)
        values: dict[str, Any] = {
            "rate/samples_per_second": self.samples_per_second,
            "rate/step_ms": 1000 * elapsed / self._steps,
            "rate/data_wait": self.data_wait,
        }
        if trainer.optimizers and trainer.optimizers[0].param_groups:
            values["optim/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        strategy: Any = trainer.strategy
        norm = strategy.global_grad_norm() if self._grad_norm is None else self._grad_norm
        if norm is not None:
            values["optim/grad_norm"] = norm
        pl_module.log_dict(values, batch_size=1)
        self._samples = self._steps = 0
        self._elapsed = 0.0
        self._waited_before += waited
        self._grad_norm = None

    def _advise(self, trainer: Trainer, elapsed: float, waited: float) -> None:
        loop, workers, prepared = trainer.fit_loop.epoch_loop, *preparation_times(trainer)
        now, before = InputTimes(0.0, 0.0, loop.copy_seconds, *prepared), self._times_before
        self._times_before = now
        grown = (now.copied - before.copied, now.busy - before.busy, now.read - before.read, now.samples - before.samples)
        if (line := self._advisor.update(InputTimes(elapsed, waited, *grown), workers)) is not None:
            log.warning("%s", line)


def _global_sample_count(trainer: Trainer, batch: Any) -> int:
    """Number of samples of all ranks in this batch; 0 if Lightning cannot count them."""
    current = current_batch(trainer)
    if current is not None and current.samples is not None:
        return current.samples
    try:
        return extract_batch_size(batch) * trainer.world_size
    except MisconfigurationException:  # an unknown type of batch must not end the run
        return 0
