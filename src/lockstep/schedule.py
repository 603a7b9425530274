"""Optimizers and learning-rate schedules by name, counted in optimizer steps."""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lockstep.errors import UsageError

ScheduleName = Literal["constant", "cosine", "step"]

_FUSED = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and filters decay; biases and norm scales (one dimension) do not.

    Source: He et al. 2019, *Bag of Tricks for Image Classification*, section 3.1.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float, fused: bool, arguments: Mapping[str, Any]) -> Optimizer:
    """``adamw``, ``sgd`` or the class at an import path such as ``torch.optim.NAdam``.

    Args:
        name: Which one.
        groups: Parameter groups.
        lr: Learning rate.
        fused: Update all parameters in one kernel, for adamw and sgd.
        arguments: Further arguments of the class.

    Raises:
        UsageError: No such optimizer, or it does not take one of the arguments.
    """
    cls: Callable[..., Any]
    if name in _FUSED:
        cls, arguments = _FUSED[name], {"fused": fused, **arguments}
    else:
        module, _, attribute = name.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, ValueError, AttributeError):
            raise UsageError(f"model.optimizer: {name!r} is not adamw, sgd or the import path of a torch optimizer.") from None
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise UsageError(f"model.optimizer: {name!r} is no torch.optim.Optimizer.")
    try:
        optimizer = cls(groups, lr=lr, **arguments)
    except TypeError as error:
        raise UsageError(f"model.optimizer_args: {error}.") from None
    assert isinstance(optimizer, Optimizer)
    return optimizer


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
