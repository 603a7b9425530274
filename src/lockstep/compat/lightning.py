"""What a run says of itself while it trains: rates, a line or a bar, ``status.json``; and the guard against a NaN loss.

Nothing here waits for the device or for other ranks, except at the steps that are logged.
"""

from lightning.pytorch import Trainer


def is_log_step(trainer: Trainer) -> bool:
    """Whether the metrics of this optimizer step are logged; the same answer on every rank."""
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()
