"""Optimizers and learning-rate schedules by name, counted in optimizer steps."""

import math
from collections.abc import Callable
from typing import Literal

from lockstep.core import UsageError

ScheduleName = Literal["constant", "cosine", "step"]


def learning_rate_factor(
    schedule: ScheduleName,
    warmup_steps: int,
    warmup_from: float = 0.0,
    total_steps: float = math.inf,
    final: float = 0.0,
    step_size: int | None = None,
    gamma: float = 0.1,
) -> Callable[[int], float]:
    """The factor on the learning rate at each optimizer step, for ``torch.optim.lr_scheduler.LambdaLR``.

    Args:
        schedule: ``constant``; ``cosine`` from 1 to ``final`` (Loshchilov and Hutter 2017, without restarts);
            ``step``: times ``gamma`` every ``step_size`` steps.
        warmup_steps: First rise linearly from ``warmup_from`` to 1 in this many steps; the schedule begins after them,
            but a cosine still ends at ``total_steps``.
        warmup_from: Factor that the warm-up starts from.
        total_steps: Length of the run; cosine needs it to be finite.
        final: Where cosine ends, as a part of the full learning rate.
        step_size: Steps between two falls.
        gamma: Factor of one fall.

    Raises:
        UsageError: The numbers give no schedule; the key is named.
    """
    if warmup_steps < 0:
        raise UsageError(f"model.warmup_steps: {warmup_steps} must be 0 or more.")
    if schedule == "step" and (step_size is None or step_size < 1):
        raise UsageError(f"model.step_size: {step_size} must be 1 or more optimizer steps with model.schedule: step.")
    if schedule == "cosine" and math.isinf(total_steps):
        raise UsageError(
            "model.schedule: cosine needs an end; set trainer.max_epochs or trainer.max_steps, or use constant or step."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warmup_from + (1 - warmup_from) * (step + 1) / (warmup_steps + 1)
        if schedule == "cosine":
            part = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, part))) / 2
        if schedule == "step":
            assert step_size is not None
            return gamma ** ((step - warmup_steps) // step_size)
        return 1.0

    return factor
