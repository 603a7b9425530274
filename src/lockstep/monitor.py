"""What a run says of itself while it trains: rates, a line or a bar, ``status.json``; and the guard against a NaN loss.

Nothing here waits for the device or for other ranks, except at the steps that are logged.
"""

import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.optim import Optimizer

from lockstep.disk import write_whole
from lockstep.errors import RunError
from lockstep.metrics import MetricsFile
from lockstep.order import GlobalBatches
from lockstep.run import Run

log = logging.getLogger(__name__)

_NEVER = 2**62


def is_log_step(trainer: Trainer) -> bool:
    """Whether the metrics of this optimizer step are logged; the same answer on every rank."""
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; None where it has no end."""
    steps = trainer.estimated_stepping_batches
    return None if math.isinf(steps) or steps < 0 else int(steps)


class Rates(Callback):
    """Logs speed, share of time spent waiting for data, learning rate and gradient norm at every logged step.

    ``rate/samples_per_second`` counts the samples of all ranks; ``rate/step_ms`` is the time of an optimizer step;
    ``rate/data_wait`` (0 to 1) is the part of that time in which the host waited for the next batch. They cover the steps
    since they were last logged, without validation. ``optim/lr`` is that of the first parameter group;
    ``optim/grad_norm`` the total 2-norm before clipping.

    Attributes:
        samples_per_second: The newest value; 0 before the first.
        train_seconds: Time spent in training steps so far, without validation.
    """

    def __init__(self) -> None:
        self.samples_per_second = 0.0
        self.train_seconds = 0.0
        self._norm: Tensor | None = None
        self._mark = 0.0
        self._samples = self._steps = 0
        self._elapsed = self._waited_before = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def _resume(self) -> None:
        self._mark = time.perf_counter()

    def _pause(self) -> None:
        if self._mark:
            passed = time.perf_counter() - self._mark
            self._elapsed += passed
            self.train_seconds += passed
            self._mark = 0.0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if is_log_step(trainer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients) if gradients else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += batch_samples(trainer, batch, batch_idx)
        if trainer.fit_loop._should_accumulate():
            return
        self._steps += 1
        if not is_log_step(trainer):
            return
        self._pause()
        self._resume()
        elapsed = max(self._elapsed, 1e-9)
        waited = trainer.fit_loop.epoch_loop.waited - self._waited_before
        self.samples_per_second = self._samples / elapsed
        values: dict[str, Any] = {
            "rate/samples_per_second": self.samples_per_second,
            "rate/step_ms": 1000 * elapsed / self._steps,
            "rate/data_wait": min(1.0, waited / elapsed),
        }
        if trainer.optimizers:
            values["optim/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        strategy: Any = trainer.strategy
        if (norm := strategy.global_norm() if self._norm is None else self._norm) is not None:
            values["optim/grad_norm"] = norm
        pl_module.log_dict(values, batch_size=1)
        self._samples = self._steps = 0
        self._elapsed = 0.0
        self._waited_before += waited
        self._norm = None


def batch_samples(trainer: Trainer, batch: Any, batch_idx: int) -> int:
    """Samples of all ranks in this batch."""
    batches = getattr(trainer.train_dataloader, "batch_sampler", None)
    if isinstance(batches, GlobalBatches):
        return batches.size(batch_idx)
    try:
        return extract_batch_size(batch) * trainer.world_size
    except MisconfigurationException:  # a batch of a kind that lightning cannot count: the rate is not worth the run
        return 0


class FiniteLoss(Callback):
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
                self._first_bad = torch.full((), _NEVER, device=loss.device)
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
        if (value := int(first)) < _NEVER:
            step, rank = divmod(value, trainer.world_size)
            raise RunError(
                f"The loss is not a finite number at step {step} on rank {rank}. Checkpoints from before it are kept; "
                "try a smaller --model.lr, a longer warm-up or --trainer.gradient_clip_val 1."
            )


class Status(Callback):
    """On rank zero: ``status.json`` and, where no progress bar is shown, one short line, every few seconds.

    Args:
        run: Where ``status.json`` goes.
        rates: Knows the speed.
        seconds: Time between two lines.
        speak: Whether to write lines to the log as well.
        trouble: Tells what is wrong with the run's files now; empty if nothing.
    """

    def __init__(
        self, run: Run, rates: Rates, attempt: int, speak: bool, trouble: Callable[[], str], seconds: float = 5.0
    ) -> None:
        self.run, self.rates, self.attempt, self.speak, self.seconds = run, rates, attempt, speak, seconds
        self.trouble = trouble
        self._next = 0.0
        self._began: tuple[float, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic(), trainer.global_step
        self.report(trainer, "training")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and time.monotonic() >= self._next and trainer.global_step:
            self.report(trainer, "training")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.speak and not trainer.sanity_checking and trainer.state.fn == "fit":
            log.info("epoch %d  step %d  %s", trainer.current_epoch, trainer.global_step, self._scores(trainer, "val"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report(trainer, "trained")

    def report(self, trainer: Trainer, state: str) -> None:
        """Write ``status.json`` now, and a line."""
        if not trainer.is_global_zero:
            return
        self._next = time.monotonic() + self.seconds
        steps, left = total_steps(trainer), self._seconds_left(trainer)
        content = {
            "status": state,
            "step": trainer.global_step,
            "steps": steps,
            "epoch": trainer.current_epoch,
            "samples_per_second": round(self.rates.samples_per_second, 1),
            "seconds_left": left,
            "attempt": self.attempt,
            "world_size": trainer.world_size,
            "metrics": newest(trainer),
            "trouble": self.trouble(),
            "time": time.time(),
        }
        try:
            write_whole(self.run.status, content)
        except OSError as error:
            log.warning("%s could not be written (%s)", self.run.status, error.strerror)
        if self.speak and state == "training" and trainer.global_step:
            left_text = "" if left is None else f"  {left:.0f} s left"
            log.info(
                "step %d%s  epoch %d  %s  %.0f samples/s%s",
                trainer.global_step,
                f"/{steps}" if steps else "",
                trainer.current_epoch,
                self._scores(trainer, "train"),
                self.rates.samples_per_second,
                left_text,
            )

    def _seconds_left(self, trainer: Trainer) -> float | None:
        steps = total_steps(trainer)
        if steps is None or self._began is None or trainer.global_step <= self._began[1]:
            return None
        passed, done = time.monotonic() - self._began[0], trainer.global_step - self._began[1]
        return round(passed / done * (steps - trainer.global_step), 1)

    @staticmethod
    def _scores(trainer: Trainer, stage: str) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in newest(trainer).items() if name.startswith(stage))


class ProgressBar(TQDMProgressBar):
    """A bar on a terminal; it shows what was logged last and so never waits for the device by itself."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        return {name: f"{value:.4g}" for name, value in newest(trainer).items() if name.startswith(("train", "val"))}


def newest(trainer: Trainer) -> dict[str, float]:
    """The metrics that were logged last, as numbers; ``trainer.logged_metrics`` are still on the device."""
    return next((logger.newest for logger in trainer.loggers if isinstance(logger, MetricsFile)), {})


def on_terminal() -> bool:
    """Whether a person sees the output as it comes."""
    return sys.stderr.isatty() and sys.stdout.isatty()
