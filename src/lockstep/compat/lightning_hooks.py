"""Call hooks without the time that Lightning spends on those that nothing overrides.

In each step Lightning calls about 25 hooks. Around each it enters a profiler, sets the module's ``_current_fx_name`` through
``nn.Module.__setattr__``, and visits every callback. On a small model that takes longer than the step itself.
"""

from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lockstep.compat import patch, private, private_imports

with private_imports("lightning"):
    from lightning.fabric.utilities.apply_func import _BLOCKING_DEVICE_TYPES
    from lightning.pytorch.trainer import call

_EMPTY = frozenset(
    private("lightning", LightningModule, name)
    for name in (
        *(f"on_{stage}_batch_{moment}" for stage in ("train", "validation", "test", "predict") for moment in ("start", "end")),
        *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    )
) | {private("lightning", Strategy, "on_train_batch_start")}
"""Hooks in Lightning's own classes that do nothing."""

_callback_hooks = private("lightning", call, "_call_callback_hooks")
_module_hook = private("lightning", call, "_call_lightning_module_hook")
_datamodule_hook = private("lightning", call, "_call_lightning_datamodule_hook")
_strategy_hook = private("lightning", call, "_call_strategy_hook")


_HOOKS = "_lockstep_hooks"
"""Attribute that marks a Trainer which calls hooks fast; holds its strategy."""


def calls_hooks_fast(trainer: Trainer) -> bool:
    """Whether ``call_hooks_fast`` has changed ``trainer``."""
    return _HOOKS in vars(trainer)


def call_hooks_fast(trainer: Trainer) -> None:
    """Let ``trainer`` call only hooks that something overrides, unless it has a profiler. Other trainers do not change."""
    patch("lightning", call, "_call_callback_hooks", _call_callback_hooks)
    patch("lightning", call, "_call_lightning_module_hook", _call_module_hook)
    patch("lightning", call, "_call_lightning_datamodule_hook", _call_datamodule_hook)
    patch("lightning", call, "_call_strategy_hook", _call_strategy_hook)
    if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
        vars(trainer)[_HOOKS] = trainer.strategy


def _call_callback_hooks(
    trainer: Trainer, hook_name: str, *args: Any, monitoring_callbacks: bool | None = None, **kwargs: Any
) -> None:
    strategy = vars(trainer).get(_HOOKS)
    if strategy is None or monitoring_callbacks is not None:
        _callback_hooks(trainer, hook_name, *args, monitoring_callbacks=monitoring_callbacks, **kwargs)
        return
    module, default = strategy.lightning_module, getattr(Callback, hook_name)
    attributes = {"_current_fx_name": None} if module is None else vars(module)
    previous, attributes["_current_fx_name"] = attributes["_current_fx_name"], hook_name
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # Checked at each call: a callback may gain a hook during a run.
        if getattr(type(callback), hook_name) is not default or hook_name in vars(callback):
            hook = getattr(callback, hook_name)
            if callable(hook):
                hook(trainer, module, *args, **kwargs)
    attributes["_current_fx_name"] = previous


def _call_module_hook(
    trainer: Trainer, hook_name: str, *args: Any, pl_module: LightningModule | None = None, **kwargs: Any
) -> Any:
    strategy = vars(trainer).get(_HOOKS)
    if strategy is None or (module := pl_module or strategy.lightning_module) is None:
        return _module_hook(trainer, hook_name, *args, pl_module=pl_module, **kwargs)
    hook = getattr(module, hook_name)
    function = getattr(hook, "__func__", None)
    if function in _EMPTY or (function is LightningModule.configure_gradient_clipping and _is_unclipped(module, kwargs)):
        return None
    if function is LightningModule.transfer_batch_to_device:
        return _move_to_device(*args)
    return _call_within(module, hook_name, hook, args, kwargs)


def _call_strategy_hook(trainer: Trainer, hook_name: str, *args: Any, **kwargs: Any) -> Any:
    strategy = vars(trainer).get(_HOOKS)
    if strategy is None:
        return _strategy_hook(trainer, hook_name, *args, **kwargs)
    hook = getattr(strategy, hook_name)
    if getattr(hook, "__func__", None) in _EMPTY:
        return None
    return _call_within(strategy.lightning_module, hook_name, hook, args, kwargs)


def _call_datamodule_hook(trainer: Trainer, hook_name: str, *args: Any, **kwargs: Any) -> Any:
    data: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    if data is None or _HOOKS not in vars(trainer):
        return _datamodule_hook(trainer, hook_name, *args, **kwargs)
    hook = getattr(data, hook_name)
    return hook(*args, **kwargs) if callable(hook) else None


def _is_unclipped(module: LightningModule, arguments: dict[str, Any]) -> bool:
    """Whether Lightning's own ``configure_gradient_clipping`` does nothing."""
    return arguments["gradient_clip_val"] is None and type(module).clip_gradients is LightningModule.clip_gradients


def _move_to_device(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
    """Lightning's ``transfer_batch_to_device``, but without its slow dispatch for a list or tuple of tensors."""
    if type(batch) in (list, tuple) and all(type(item) is Tensor for item in batch):
        non_blocking = device.type not in _BLOCKING_DEVICE_TYPES
        return type(batch)(item.to(device, non_blocking=non_blocking) for item in batch)
    return move_data_to_device(batch, device)


def _call_within(module: LightningModule, name: str, hook: Any, args: Any, kwargs: Any) -> Any:
    """Call ``hook`` while the module has its ``name``, which determines what ``self.log`` does."""
    if not callable(hook):
        return None
    attributes = vars(module)
    previous, attributes["_current_fx_name"] = attributes["_current_fx_name"], name
    output = hook(*args, **kwargs)
    attributes["_current_fx_name"] = previous
    return output
