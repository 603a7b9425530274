"""Activation checkpointing: chosen submodules do not keep activations, but recompute them in backward.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
"""

import functools
import pkgutil
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lockstep.core import UsageError, did_you_mean


class ActivationCheckpointing(Callback):
    """Recompute every submodule of the classes with the import paths ``paths`` in backward.

    Raises:
        UsageError: A class is not an ``nn.Module``, or the module has no submodule of it.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the submodules' ``forward``: the module is complete now, and has not run yet."""
        for path in self.paths:
            cls = _import_class(path)
            submodules = [module for module in pl_module.modules() if isinstance(module, cls)]
            if not submodules:
                names = sorted({f"{type(module).__module__}.{type(module).__name__}" for module in pl_module.modules()})
                hint = did_you_mean(path, names)
                raise UsageError(f"activation_checkpointing: the module has no submodule of class {path}{hint}")
            for module in submodules:
                # Not a wrapper module, which would change the names in a checkpoint.
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def _import_class(path: str) -> Any:
    try:
        cls = pkgutil.resolve_name(path)
    except (ImportError, ValueError, AttributeError):
        raise UsageError(f"activation_checkpointing: {path!r} is not the import path of a class.") from None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UsageError(f"activation_checkpointing: {path!r} is not an nn.Module.")
    return cls
