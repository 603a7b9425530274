"""Activation checkpointing: chosen parts of a module keep no activations, and are computed again in backward.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lockstep.core import UsageError, did_you_mean

_KEY = "activation_checkpointing"


class ActivationCheckpointing(Callback):
    """Has every part of a module that is of one of some classes computed again in backward.

    Args:
        paths: Import paths of the classes.

    Raises:
        UsageError: One of them is no ``nn.Module``, or the module has no part of it.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now the module is complete, and nobody has computed with it yet."""
        for path in self.paths:
            cls = _import_class(path)
            parts = [part for part in pl_module.modules() if isinstance(part, cls)]
            if not parts:
                names = sorted({f"{type(p).__module__}.{type(p).__name__}" for p in pl_module.modules()})
                raise UsageError(f"{_KEY}: the module has no part that is a {path}{did_you_mean(path, names)}")
            for part in parts:
                # Not a wrapper around it: the names in a checkpoint stay as they are.
                part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)


def _import_class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError):
        raise UsageError(f"{_KEY}: {path!r} is not the import path of a class.") from None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UsageError(f"{_KEY}: {path!r} is no nn.Module.")
    return cls
