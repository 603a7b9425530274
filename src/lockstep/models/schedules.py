"""Learning-rate schedules, counted in optimizer steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lockstep.core import UsageError

ScheduleName = Literal["constant", "cosine", "step"]


@dataclass(frozen=True)
class LearningRateSchedule:
    """A linear warm-up to the full learning rate, then a schedule.

    The schedule is ``constant``; ``cosine`` from 1 to ``final`` (Loshchilov and Hutter 2017, without restarts), which ends at
    the last step of the run for any warm-up; or ``step``: times ``gamma`` every ``step_size`` steps.

    Raises:
        UsageError: A number is out of range; names the key.
    """

    name: ScheduleName
    warmup_steps: int = 0
    final: float = 0.0
    step_size: int | None = None
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UsageError(f"model.warmup_steps: {self.warmup_steps} must be 0 or more.")
        if self.name == "step" and (self.step_size is None or self.step_size < 1):
            raise UsageError(f"model.step_size: {self.step_size} must be 1 or more optimizer steps with model.schedule: step.")

    def factor(self, total_steps: float = math.inf, warmup_start: float = 0.0) -> Callable[[int], float]:
        """The factor on the learning rate at each optimizer step, for ``torch.optim.lr_scheduler.LambdaLR``.

        Raises:
            UsageError: A cosine needs a run with an end.
        """
        if self.name == "cosine" and math.isinf(total_steps):
            raise UsageError(
                "model.schedule: cosine needs an end; set trainer.max_epochs or trainer.max_steps, or use constant or step."
            )

        def factor(step: int) -> float:
            after_warmup = step - self.warmup_steps
            if after_warmup < 0:
                return warmup_start + (1 - warmup_start) * (step + 1) / (self.warmup_steps + 1)
            if self.name == "cosine":
                progress = min(1.0, after_warmup / max(1, total_steps - self.warmup_steps))
                return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
            if self.step_size is not None and self.name == "step":
                return self.gamma ** (after_warmup // self.step_size)
            return 1.0

        return factor
