"""Private names of Lightning."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops import training_epoch_loop
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.trainer.connectors.logger_connector import logger_connector
from lightning.pytorch.trainer.connectors.logger_connector import result as results_module
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from lockstep.compat import patch, private
from lockstep.compat.torchmetrics import capture_metric, merge_metric

private("lightning", private("lightning", training_epoch_loop, "_TrainingEpochLoop"), "_should_accumulate")
private("lightning", private("lightning", logger_connector, "_LoggerConnector"), "should_update_logs")
private("lightning", rank_zero_only, "rank")


def set_rank_zero(rank: int) -> None:
    """Tell Lightning the global rank; it reads the environment when imported, which is too early for a forked rank."""
    rank_zero_only.rank = rank  # type: ignore[attr-defined]


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the current batch only accumulates gradients, without an optimizer step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def is_log_step(trainer: Trainer) -> bool:
    """Whether the metrics of this optimizer step are logged; the same answer on every rank."""
    return trainer._logger_connector.should_update_logs and not is_accumulating(trainer)


# Checkpoints and strategies.

_Metadata, _ResultMetric, _Sync = (
    private("lightning", results_module, name) for name in ("_Metadata", "_ResultMetric", "_Sync")
)
private("lightning", private("lightning", checkpoint_connector, "_CheckpointConnector"), "dump_checkpoint")
private("lightning", private("lightning", training_epoch_loop, "_TrainingEpochLoop"), "_is_training_done")
for _name in ("_format_config", "_init_deepspeed_distributed", "_init_optimizers"):
    private("lightning", DeepSpeedStrategy, _name)
_METADATA_FIELDS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Lightning's checkpoint: weights, optimizers, schedules, loops and callbacks; tensors are live."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


def is_training_done(trainer: Trainer) -> bool:
    """Whether the newest step was the last one of its epoch or of the run."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def capture_logged_values(trainer: Trainer) -> dict[str, Any]:
    """Values logged in this epoch that are not reduced yet, and the newest values of all metrics; tensors are live."""
    connector = private("lightning", trainer, "_logger_connector")
    results: dict[str, Any] = private("lightning", trainer.fit_loop.epoch_loop, "_results")
    return {
        "results": {key: _capture_result(result) for key, result in results.items() if not result.has_reset},
        "callback_metrics": dict(private("lightning", connector, "_callback_metrics")),
        "logged_metrics": dict(private("lightning", connector, "_logged_metrics")),
    }


def restore_logged_values(trainer: Trainer, states: Sequence[Mapping[str, Any]]) -> None:
    """Restore what ``capture_logged_values`` returned on the ranks that this rank replaces."""
    connector, results = trainer._logger_connector, trainer.fit_loop.epoch_loop._results
    results.clear()
    for state in states:
        for key, saved in state["results"].items():
            if key not in results:
                results[key] = _make_result(saved, trainer)
            meta = results[key].meta
            merge_metric(results[key], saved["metric"], None if meta.is_mean_reduction else meta.reduce_fx)
    for state in states[:1]:
        connector._callback_metrics.update(state["callback_metrics"])
        connector._logged_metrics.update(state["logged_metrics"])
    # The first batch of an epoch would clear the results; the next batch must not count as one.
    patch("lightning", connector, "_first_loop_iter", False)


def _capture_result(result: Any) -> dict[str, Any]:
    meta = result.meta
    return {
        "meta": {name: getattr(meta, name) for name in _METADATA_FIELDS} | {"reduce_fx": meta.reduce_fx.__name__},
        "sync": {"_should": meta.sync._should, "rank_zero_only": meta.sync.rank_zero_only},
        "is_tensor": result.is_tensor,
        "last": result._forward_cache,
        "metric": capture_metric(result),
    }


def _make_result(saved: Mapping[str, Any], trainer: Trainer) -> Any:
    meta = _Metadata(**saved["meta"])
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
        """Complete DeepSpeed's config by what the Trainer knows."""
        super()._format_config()

    def make_optimizer(self) -> tuple[Optimizer, Any]:
        """Make the module's optimizer, and its schedule if it has one."""
        return super()._init_optimizers()

    def _format_config(self) -> None:
        self.format_config()

    def _init_optimizers(self) -> tuple[Optimizer, Any]:
        return self.make_optimizer()
