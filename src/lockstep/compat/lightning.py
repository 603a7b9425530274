"""What a run says of itself while it trains: rates, a line or a bar, ``status.json``; and the guard against a NaN loss.

Nothing here waits for the device or for other ranks, except at the steps that are logged.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.connectors.logger_connector import result as _results_module
from torch import Tensor
from torch.optim import Optimizer

from lockstep.compat import private


def is_log_step(trainer: Trainer) -> bool:
    """Whether the metrics of this optimizer step are logged; the same answer on every rank."""
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()


# Checkpoints.

ResultMetric: Any = private("lightning", _results_module, "_ResultMetric")
_Metadata: Any = private("lightning", _results_module, "_Metadata")
_Sync: Any = private("lightning", _results_module, "_Sync")
_METADATA_FIELDS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip


def verify_checkpoint_names(trainer: Trainer) -> None:
    """Fail at the start of training, and not at its first save, where a private name that a save needs is gone."""
    for owner, names in {
        "_logger_connector": ("_callback_metrics", "_logged_metrics", "_first_loop_iter"),
        "_checkpoint_connector": ("dump_checkpoint",),
    }.items():
        for name in names:
            private("lightning", private("lightning", trainer, owner), name)
    for name in ("_results", "_is_training_done", "_should_accumulate"):
        private("lightning", trainer.fit_loop.epoch_loop, name)


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Lightning's checkpoint as a dict: weights, optimizers, schedules, loops and callbacks; tensors are live."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


def is_training_done(trainer: Trainer) -> bool:
    """Whether the newest step was the last one of its epoch or of the run."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def is_accumulating(trainer: Trainer) -> bool:
    """Whether more batches follow before the optimizer steps."""
    return bool(trainer.fit_loop._should_accumulate())


def logged_results(trainer: Trainer) -> dict[str, Any]:
    """Values logged in training that are not reduced yet: a live dict of ``ResultMetric``, by key."""
    results: dict[str, Any] = trainer.fit_loop.epoch_loop._results
    return results


def capture_result(result: Any) -> dict[str, Any]:
    """What defines a ``ResultMetric``, and its newest value; its accumulated state is that of any metric."""
    meta = result.meta
    return {
        "meta": {name: getattr(meta, name) for name in _METADATA_FIELDS} | {"reduce_fx": meta.reduce_fx.__name__},
        "sync": {"_should": meta.sync._should, "rank_zero_only": meta.sync.rank_zero_only},
        "is_tensor": result.is_tensor,
        "last": result._forward_cache,
    }


def make_result(saved: Mapping[str, Any], trainer: Trainer) -> Any:
    """Make an empty ``ResultMetric`` as ``capture_result`` has described it."""
    meta = _Metadata(**saved["meta"])
    meta.sync = _Sync(fn=trainer.strategy.reduce, **saved["sync"])
    result = ResultMetric(meta, saved["is_tensor"])
    if not saved["is_tensor"]:
        result.value = trainer.lightning_module.get_submodule(meta.metric_attribute or "")
    result._forward_cache = saved["last"]
    return result.to(trainer.strategy.root_device)


def result_reduction(result: Any) -> Callable[[Tensor], Tensor] | None:
    """What combines the values of a ``ResultMetric``; None for a mean, whose sum and count are added."""
    return None if result.meta.is_mean_reduction else result.meta.reduce_fx


def capture_newest_metrics(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """The newest values of ``trainer.callback_metrics`` and ``trainer.logged_metrics``."""
    connector = trainer._logger_connector
    return {"callback_metrics": dict(connector._callback_metrics), "logged_metrics": dict(connector._logged_metrics)}


def restore_newest_metrics(trainer: Trainer, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Add the values that ``capture_newest_metrics`` has returned."""
    trainer._logger_connector._callback_metrics.update(saved["callback_metrics"])
    trainer._logger_connector._logged_metrics.update(saved["logged_metrics"])


def keep_logged_results(trainer: Trainer) -> None:
    """Let the next batch not count as the first of its epoch, which would clear ``logged_results``."""
    trainer._logger_connector._first_loop_iter = False


# Strategies. An override of a method that Lightning no longer calls would silently do nothing.

for _owner, _names in (
    (DDPStrategy, ("_register_ddp_hooks",)),
    (
        DeepSpeedStrategy,
        ("_format_config", "_init_deepspeed_distributed", "_init_optimizers", "_setup_model_and_optimizer"),
    ),
):
    for _name in _names:
        private("lightning", _owner, _name)


class LightningDDPStrategy(DDPStrategy):
    """Lightning's strategy for DDP with a public hook."""

    def register_hooks(self) -> None:
        """Called when the model is wrapped; Lightning's own registers communication hooks on GPUs only."""
        super()._register_ddp_hooks()

    def _register_ddp_hooks(self) -> None:
        self.register_hooks()


class LightningDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's strategy for DeepSpeed with public hooks."""

    def init_process_group(self) -> None:
        """Start DeepSpeed's communication."""
        self._init_deepspeed_distributed()

    def format_config(self) -> None:
        """Complete DeepSpeed's config by what the Trainer knows."""
        super()._format_config()

    def make_optimizer(self) -> tuple[Optimizer, Any]:
        """Make the module's optimizer, and its schedule if it has one."""
        return super()._init_optimizers()

    def make_engine(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap module and optimizer in DeepSpeed's engine."""
        return super()._setup_model_and_optimizer(*args, **kwargs)

    def _format_config(self) -> None:
        self.format_config()

    def _init_optimizers(self) -> tuple[Optimizer, Any]:
        return self.make_optimizer()

    def _setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        return self.make_engine(*args, **kwargs)
