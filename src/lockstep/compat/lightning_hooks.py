"""Calls of hooks, without what Lightning spends on hooks that nobody overrides.

In each step Lightning calls about 25 hooks. Around each it enters a profiler, sets the module's ``_current_fx_name`` through
``nn.Module.__setattr__``, and visits every callback. On a small model that takes longer than the step itself.
"""

from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy

from lockstep.compat import patch, private, private_imports

with private_imports("lightning"):
    from lightning.pytorch.trainer import call

_EMPTY = frozenset(
    private("lightning", owner, name)
    for owner, names in (
        (
            LightningModule,
            ("on_train_batch_start", "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end"),
        ),
        (LightningModule, ("on_test_batch_start", "on_test_batch_end", "on_predict_batch_start", "on_predict_batch_end")),
        (LightningModule, ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")),
        (Strategy, ("on_train_batch_start",)),
    )
    for name in names
)
"""Hooks of Lightning's own that do nothing."""

_callback_hooks = private("lightning", call, "_call_callback_hooks")
_module_hook = private("lightning", call, "_call_lightning_module_hook")
_datamodule_hook = private("lightning", call, "_call_lightning_datamodule_hook")
_strategy_hook = private("lightning", call, "_call_strategy_hook")


def call_hooks_fast(trainer: Trainer) -> None:
    """Let ``trainer`` call only hooks that somebody overrides, unless it has a profiler. Other trainers call all, as before."""
    patch("lightning", call, "_call_callback_hooks", _call_callback_hooks)
    patch("lightning", call, "_call_lightning_module_hook", _call_module_hook)
    patch("lightning", call, "_call_lightning_datamodule_hook", _call_datamodule_hook)
    patch("lightning", call, "_call_strategy_hook", _call_strategy_hook)
    vars(trainer)[_MARK] = type(trainer.profiler) is PassThroughProfiler


_MARK = "_lockstep_calls_hooks_fast"


def _call_callback_hooks(
    trainer: Trainer, hook_name: str, *args: Any, monitoring_callbacks: bool | None = None, **kwargs: Any
) -> None:
    if monitoring_callbacks is not None or not getattr(trainer, _MARK, False):
        _callback_hooks(trainer, hook_name, *args, monitoring_callbacks=monitoring_callbacks, **kwargs)
        return
    default = getattr(Callback, hook_name)
    attributes = previous = module = None
    for callback in trainer.callbacks:
        hook = getattr(callback, hook_name)
        if getattr(hook, "__func__", None) is default or not callable(hook):
            continue
        if attributes is None:
            module = trainer.lightning_module
            attributes = {} if module is None else vars(module)
            previous = attributes.get("_current_fx_name")
            attributes["_current_fx_name"] = hook_name
        hook(trainer, module, *args, **kwargs)
    if attributes is not None:
        attributes["_current_fx_name"] = previous


def _call_module_hook(
    trainer: Trainer, hook_name: str, *args: Any, pl_module: LightningModule | None = None, **kwargs: Any
) -> Any:
    module = pl_module or trainer.lightning_module
    if module is None or not getattr(trainer, _MARK, False):
        return _module_hook(trainer, hook_name, *args, pl_module=pl_module, **kwargs)
    hook = getattr(module, hook_name)
    return None if getattr(hook, "__func__", None) in _EMPTY else _call_within(module, hook_name, hook, args, kwargs)


def _call_strategy_hook(trainer: Trainer, hook_name: str, *args: Any, **kwargs: Any) -> Any:
    if not getattr(trainer, _MARK, False):
        return _strategy_hook(trainer, hook_name, *args, **kwargs)
    hook = getattr(trainer.strategy, hook_name)
    if getattr(hook, "__func__", None) in _EMPTY:
        return None
    return _call_within(trainer.lightning_module, hook_name, hook, args, kwargs)


def _call_datamodule_hook(trainer: Trainer, hook_name: str, *args: Any, **kwargs: Any) -> Any:
    data: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    if data is None or not getattr(trainer, _MARK, False):
        return _datamodule_hook(trainer, hook_name, *args, **kwargs)
    hook = getattr(data, hook_name)
    return hook(*args, **kwargs) if callable(hook) else None


def _call_within(module: LightningModule, name: str, hook: Any, args: Any, kwargs: Any) -> Any:
    """Call ``hook`` while the module knows its ``name``, which decides what ``self.log`` does."""
    if not callable(hook):
        return None
    attributes = vars(module)
    previous, attributes["_current_fx_name"] = attributes["_current_fx_name"], name
    output = hook(*args, **kwargs)
    attributes["_current_fx_name"] = previous
    return output
