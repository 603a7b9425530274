"""Activation checkpointing: chosen submodules keep no activations and recompute them in backward.

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
    """Recompute every submodule of the given classes in backward.

    Args:
        paths: Import paths of the classes.

    Raises:
        UsageError: A class is not an ``nn.Module``, or the module has no submodule of it.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the submodules' ``forward``; here the module is complete and has not run yet."""
        for path in self.paths:
            cls = _import_class(path)
            submodules = [module for module in pl_module.modules() if isinstance(module, cls)]
            if not submodules:
                names = sorted({f"{type(module).__module__}.{type(module).__name__}" for module in pl_module.modules()})
                raise UsageError(f"{_KEY}: the module has no submodule of class {path}{did_you_mean(path, names)}")
            for module in submodules:
                # Not a wrapper module, which would change the names in a checkpoint.
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def _import_class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError):
        raise UsageError(f"{_KEY}: {path!r} is not the import path of a class.") from None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UsageError(f"{_KEY}: {path!r} is not an nn.Module.")
    return cls
