"""Private names of Lightning."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.optim import Optimizer
from torchmetrics import Metric

from lockstep.compat import patch, private, private_imports
from lockstep.compat.lightning_epoch import LightningEpochLoop, cache_batch_hooks
from lockstep.compat.torchmetrics import capture_metric, merge_metric

with private_imports("lightning"):
    from lightning.fabric.utilities import registry as _registry
    from lightning.fabric.utilities.data import _set_sampler_epoch as set_sampler_epoch
    from lightning.pytorch.loops.fit_loop import _FitLoop
    from lightning.pytorch.loops.loop import _Loop
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.trainer.call import _call_callback_hooks, _call_lightning_module_hook
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
    from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
    from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
    from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES

# Methods too: an override of one that Lightning no longer calls would silently do nothing.
for _owner, _names in (
    (_TrainingEpochLoop, ("_is_training_done", "_should_accumulate")),
    (_FitLoop, ("_can_stop_early",)),
    (_CheckpointConnector, ("dump_checkpoint",)),
    (CombinedLoader, ("_state_dicts",)),
    (DeepSpeedStrategy, ("_format_config", "_init_deepspeed_distributed", "_init_optimizers")),
):
    for _name in _names:
        private("lightning", _owner, _name)


def find_plugins_once() -> None:
    """Find packages that add callbacks or backends now, and not in each forked rank: it reads a file of every package."""
    entry_points: Any = metadata.entry_points
    if not hasattr(entry_points, "cache_clear"):
        entry_points = cache(entry_points)
        patch("importlib", metadata, "entry_points", entry_points)
        patch("lightning", _registry, "entry_points", entry_points)
    for group in ("lightning.pytorch.callbacks_factory", "torch.distributed.backends"):
        entry_points(group=group)


def set_rank_zero(rank: int) -> None:
    """Set the global rank in Lightning, which reads it from the environment on import: too early for a forked rank."""
    patch("lightning", rank_zero_only, "rank", rank)


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the current batch only accumulates gradients, without an optimizer step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


class LightningCombinedLoader(CombinedLoader):
    """Lightning's combination of loaders, with public hooks."""

    @property
    def mode(self) -> str:
        """How the loaders are combined: ``max_size_cycle``, ``max_size``, ``min_size`` or ``sequential``."""
        return self._mode

    def start_iteration(self, iterables: Sequence[Iterable[Any]], consumed: Sequence[bool]) -> None:
        """Iterate over ``iterables``, one per loader; ``consumed`` marks those that have already ended once in this epoch."""
        self._iterator = iter(_SUPPORTED_MODES[self._mode]["iterator"](list(iterables), self._limits))
        if self._mode == "max_size_cycle":
            patch("lightning", self._iterator, "_consumed", list(consumed))

    def _state_dicts(self) -> list[dict[str, Any]]:
        return []  # Lightning would save those of rank zero, one batch ahead; lockstep saves those of each rank

    def combine_counts(self, counts: Sequence[int]) -> int:
        """The number of combined batches if the loaders have ``counts``."""
        return _SUPPORTED_MODES[self._mode]["fn"](list(counts))


def split_combination(loaders: Any) -> tuple[Any, Any]:
    """The loaders that ``train_dataloader`` returns, and the mode in which Lightning combines them."""
    return (loaders.iterables, loaders._mode) if isinstance(loaders, CombinedLoader) else (loaders, "max_size_cycle")


def overridden_iteration(loaders: Any) -> str | None:
    """The iteration method that a subclass of CombinedLoader overrides; None if there is none, or for other objects."""
    if not isinstance(loaders, CombinedLoader):
        return None
    names = ("__iter__", "__next__", "__len__")
    return next((name for name in names if getattr(type(loaders), name) is not getattr(CombinedLoader, name)), None)


def training_loader(trainer: Trainer) -> tuple[CombinedLoader | None, int]:
    """The loader of training, and the number of batches that are fetched but not trained on yet."""
    loop = trainer.fit_loop
    return loop._combined_loader, len(getattr(loop._data_fetcher, "batches", ()))


def current_hook(module: LightningModule) -> str | None:
    """Name of the hook that the Trainer is calling on ``module`` or a callback; None between two calls."""
    hook: str | None = private("lightning", module, "_current_fx_name")
    return hook


@dataclass
class _CombiningSource(_DataLoaderSource):
    """A source of loaders; ``combine`` requests them with the function that it receives, and combines them."""

    combine: Callable[[Callable[[], Any]], CombinedLoader]

    def dataloader(self) -> CombinedLoader:
        return self.combine(super().dataloader)


class LightningFitLoop(_FitLoop):
    """Lightning's loop over epochs, with public hooks."""

    epoch_loop: LightningEpochLoop

    def __init__(self, trainer: Trainer, min_epochs: int | None = 0, max_epochs: int | None = None) -> None:
        super().__init__(trainer, min_epochs, max_epochs)
        for name in ("_combined_loader", "_data_fetcher"):
            private("lightning", self, name)

    @property
    def _data_fetcher(self) -> Any:
        return vars(self)["_fetcher"]

    @_data_fetcher.setter
    def _data_fetcher(self, fetcher: Any) -> None:
        vars(self)["_fetcher"] = None if fetcher is None else self.choose_fetcher(fetcher)

    def choose_fetcher(self, fetcher: Any) -> Any:
        """Return the fetcher to use for the batches of ``_combined_loader``, in place of Lightning's ``fetcher``."""
        return fetcher

    def combine_loaders(self, request: Callable[[], Any]) -> CombinedLoader:
        """Return the training loader; ``request`` returns what ``train_dataloader`` returns."""
        return CombinedLoader(*split_combination(request()))

    def setup_data(self) -> None:
        source = private("lightning", self, "_data_source")
        cache_batch_hooks(self.trainer)
        self._data_source = _CombiningSource(source.instance, source.name, self.combine_loaders)
        try:
            super().setup_data()
        finally:
            self._data_source = source

    def restart_iteration(self) -> None:
        """Iterate over the training data again, with new workers."""
        iter(private("lightning", self, "_data_fetcher"))

    @property
    def loaded_epochs(self) -> list[int | None]:
        """The epochs in which the training and the validation loaders were requested; None: not yet."""
        found = (
            private("lightning", self, "_last_train_dl_reload_epoch"),
            private("lightning", self.epoch_loop.val_loop, "_last_val_dl_reload_epoch"),
        )
        return [int(epoch) if math.isfinite(epoch) else None for epoch in found]

    def set_train_loaded_epoch(self, epoch: int) -> None:
        """Count ``reload_dataloaders_every_n_epochs`` from ``epoch``."""
        patch("lightning", self, "_last_train_dl_reload_epoch", epoch)

    def set_completed_batches(self, count: int) -> None:
        """Continue the epoch as after its first ``count`` batches."""
        progress = self.epoch_loop.batch_progress
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress.current, name, count)
        progress.is_last_batch = count >= self.max_batches

    def clear_restarting(self) -> None:
        """Prevent Lightning from deriving the position from the counters of the loops when the run starts.

        The setter of the fit loop itself would set the flag again for a run that is limited by steps.
        """
        _Loop.restarting.fset(self, False)  # type: ignore[attr-defined]


def call_hooks(trainer: Trainer, name: str) -> None:
    """Call the hook ``name`` of all callbacks and of the module."""
    _call_callback_hooks(trainer, name)
    _call_lightning_module_hook(trainer, name)


def disable_signal_handlers(trainer: Trainer) -> None:
    """Prevent Lightning from installing signal handlers."""
    patch("lightning", private("lightning", trainer, "_signal_connector"), "register_signal_handlers", lambda: None)


def keep_dataloaders(trainer: Trainer) -> None:
    """Prevent Lightning from replacing the DataLoaders; for predict it would add a batch sampler that records indices."""
    connector = private("lightning", trainer, "_data_connector")
    patch("lightning", connector, "_prepare_dataloader", lambda dataloader, shuffle, mode: dataloader)


def keep_original_weights(pruning: ModelPruning) -> None:
    """Make a lottery ticket copy the original weights: on a CPU it would share, and so train, the same tensors."""
    copy_parameter = private("lightning", pruning, "_copy_param")
    patch("lightning", pruning, "_copy_param", lambda new, old, name: copy_parameter(new, copy.deepcopy(old), name))


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Lightning's checkpoint: weights, optimizers, schedules, loops and callbacks; tensors are live."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def is_training_done(trainer: Trainer) -> bool:
    """Whether the newest step was the last one of its epoch or of the run."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def is_stopping(trainer: Trainer) -> bool:
    """Whether training ends before its limits, because ``Trainer.should_stop`` was set."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


def logged_results(trainer: Trainer) -> list[Metric]:
    """The values that this rank has logged with ``self.log`` in the current stage."""
    results: dict[str, Metric] | None = private("lightning", trainer, "_results")
    return [] if results is None else list(results.values())


def is_reduced_in_step(result: Any) -> bool:
    """Whether the newest value of ``result``, one of ``logged_results``, is reduced over all ranks."""
    return bool(result.is_tensor and result.meta.sync.should and not result.meta.sync.rank_zero_only)


def capture_logged_values(trainer: Trainer) -> dict[str, Any]:
    """Values logged in this epoch that are not reduced yet, and the newest values of all metrics; tensors are live."""
    connector = private("lightning", trainer, "_logger_connector")
    results: dict[str, Any] = private("lightning", trainer.fit_loop.epoch_loop, "_results")
    return {
        "results": {key: _capture_result(result, trainer) for key, result in results.items() if not result.has_reset},
        "callback_metrics": dict(private("lightning", connector, "_callback_metrics")),
        "logged_metrics": dict(private("lightning", connector, "_logged_metrics")),
    }


def restore_logged_values(
    trainer: Trainer, states: Sequence[Mapping[str, Any]], shared: Mapping[str, Any], is_mid_epoch: bool
) -> None:
    """Restore what ``capture_logged_values`` returned on the ranks that this rank replaces.

    A rank that replaces none takes from ``shared``, the state of a rank, what all ranks have, and what they reduce together.
    """
    connector, results = trainer._logger_connector, trainer.fit_loop.epoch_loop._results
    results.clear()
    for key, saved in {} if states else shared["results"].items():
        results[key] = _make_result(saved, trainer)
        is_reduced = saved["sync"]["_should"] or not saved["is_tensor"]
        merge_metric(results[key], {**saved["metric"], "values": {}} if is_reduced else saved["metric"])
    for state in states:
        for key, saved in state["results"].items():
            if key not in results:
                results[key] = _make_result(saved, trainer)
            meta = results[key].meta
            merge_metric(results[key], saved["metric"], None if meta.is_mean_reduction else meta.reduce_fx)
    connector._callback_metrics.update(shared["callback_metrics"])
    connector._logged_metrics.update(shared["logged_metrics"])
    if is_mid_epoch:  # Lightning clears the results at the first batch of an epoch; the next batch is not the first
        patch("lightning", connector, "_first_loop_iter", False)


class _RestoredMetadata(_Metadata):
    """How a value was logged; equal with and without ``sync_dist``, which Lightning ignores on a single rank."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Metadata) and self._comparable(self) == self._comparable(other)

    @staticmethod
    def _comparable(metadata: _Metadata) -> dict[str, Any]:
        """Lightning takes Python's ``max`` for that of torch."""
        return vars(metadata) | {"_sync": None, "reduce_fx": metadata.reduce_fx.__name__}


def _capture_result(result: Any, trainer: Trainer) -> dict[str, Any]:
    meta = dict(vars(result.meta))
    sync = meta.pop("_sync")
    return {
        "meta": meta | {"reduce_fx": meta["reduce_fx"].__name__},
        # Ranks that are added later do not have the values that a single rank has logged.
        "sync": {"_should": sync._should or trainer.world_size == 1, "rank_zero_only": sync.rank_zero_only},
        "is_tensor": result.is_tensor,
        "last": result._forward_cache,
        "metric": capture_metric(result),
    }


def _make_result(saved: Mapping[str, Any], trainer: Trainer) -> Any:
    meta = _RestoredMetadata(**saved["meta"])
    meta.sync = _Sync(fn=trainer.strategy.reduce, **saved["sync"])
    result = _ResultMetric(meta, saved["is_tensor"])
    if not saved["is_tensor"]:
        result.value = trainer.lightning_module.get_submodule(meta.metric_attribute or "")
    result._forward_cache = saved["last"]
    return result.to(trainer.strategy.root_device)


class LightningDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's strategy for DeepSpeed with public hooks."""

    def init_process_group(self) -> None:
        """Start DeepSpeed's communication."""
        self._init_deepspeed_distributed()

    def format_config(self) -> None:
        """Complete DeepSpeed's config with the settings of the Trainer."""
        super()._format_config()

    def make_optimizer(self) -> tuple[Optimizer, Any]:
        """Make the module's optimizer, and its schedule if it has one."""
        return super()._init_optimizers()

    def _format_config(self) -> None:
        self.format_config()

    def _init_optimizers(self) -> tuple[Optimizer, Any]:
        return self.make_optimizer()
