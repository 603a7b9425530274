"""Optimizers by name or class path."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lockstep.config import OPTIMIZERS
from lockstep.core import UsageError

_FUSED = dict(zip(OPTIMIZERS, (torch.optim.AdamW, torch.optim.SGD), strict=True))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and filters with weight decay; biases and norm scales (1-D) without.

    Source: He et al. 2019, *Bag of Tricks for Image Classification*, section 3.1.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(name: str, groups: list[dict[str, Any]], lr: float, fused: bool, arguments: Mapping[str, Any]) -> Optimizer:
    """Create ``adamw``, ``sgd`` or an optimizer by import path; ``fused`` selects the fused kernels of the first two.

    Raises:
        UsageError: The optimizer is unknown, or does not take one of the arguments.
    """
    cls: Any
    if name in _FUSED:
        cls, arguments = _FUSED[name], {"fused": fused, **arguments}
    else:
        module, _, attribute = name.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, ValueError, AttributeError):
            raise UsageError(f"model.optimizer: {name!r} is not adamw, sgd or the import path of a torch optimizer.") from None
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise UsageError(f"model.optimizer: {name!r} is not a subclass of torch.optim.Optimizer.")
    try:
        optimizer: Optimizer = cls(groups, lr=lr, **arguments)
    except TypeError as error:
        raise UsageError(f"model.optimizer_args: {error}.") from None
    return optimizer
