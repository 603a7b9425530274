"""Private names of Lightning."""

from lightning.pytorch import Trainer
from lightning.pytorch.loops import training_epoch_loop
from lightning.pytorch.trainer.connectors.logger_connector import logger_connector
from lightning.pytorch.utilities import rank_zero_only

from lockstep.compat import private

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
