"""What a run says of itself while it trains: rates, a line or a bar, ``status.json``; and the guard against a NaN loss.

Nothing here waits for the device or for other ranks, except at the steps that are logged.
"""

from typing import Any

from lightning.pytorch import Trainer

from lockstep.compat import patch, private, private_imports


def is_log_step(trainer: Trainer) -> bool:
    """Whether the metrics of this optimizer step are logged; the same answer on every rank."""
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()


with private_imports("lightning"):
    from lightning.fabric.utilities.data import _set_sampler_epoch as set_sampler_epoch
    from lightning.pytorch.loops.fetchers import _DataFetcher as DataFetcher
    from lightning.pytorch.loops.fit_loop import _FitLoop
    from lightning.pytorch.loops.loop import _Loop
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.trainer.call import _call_callback_hooks, _call_lightning_module_hook

# An override of a method that Lightning no longer calls would do nothing, silently.
for _name in ("_broadcast_sigterm_tensor", "_on_before_fetch", "_on_after_fetch", "_should_accumulate", "_should_check_val_fx"):
    private("lightning", _TrainingEpochLoop, _name)


class LightningEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, without its broadcast at each step and with public hooks."""

    def before_fetch(self) -> None:
        """Called before the loop takes the next batch."""

    def after_fetch(self) -> None:
        """Called when the loop has the next batch."""

    def validates_next(self, data_fetcher: DataFetcher) -> bool | None:
        """Return whether a validation follows the optimizer step that has just ended; None within an accumulated batch."""
        return None if self._should_accumulate() else self._should_check_val_fx(data_fetcher)

    def _broadcast_sigterm_tensor(self) -> None:
        pass

    def _on_before_fetch(self) -> None:
        self.before_fetch()
        super()._on_before_fetch()

    def _on_after_fetch(self) -> None:
        super()._on_after_fetch()
        self.after_fetch()


class LightningFitLoop(_FitLoop):
    """Lightning's loop over epochs."""

    @property
    def train_loaders(self) -> list[Any]:
        """The DataLoaders of this epoch, after ``setup_data``."""
        loaders: list[Any] = private("lightning", self, "_combined_loader").flattened
        return loaders

    def clear_restarting(self) -> None:
        """Let Lightning derive nothing from the loops' counters when the run starts.

        The setter of the fit loop itself would set the flag again for a run that is limited by steps.
        """
        _Loop.restarting.fset(self, False)  # type: ignore[attr-defined]


def call_hooks(trainer: Trainer, name: str) -> None:
    """Call the hook ``name`` of all callbacks and of the module."""
    _call_callback_hooks(trainer, name)
    _call_lightning_module_hook(trainer, name)


def disable_signal_handlers(trainer: Trainer) -> None:
    """Keep Lightning from installing signal handlers."""
    patch("lightning", private("lightning", trainer, "_signal_connector"), "register_signal_handlers", lambda: None)


def keep_dataloaders(trainer: Trainer) -> None:
    """Keep Lightning from replacing the DataLoaders; for predict it would add a batch sampler that records indices."""
    connector = private("lightning", trainer, "_data_connector")
    patch("lightning", connector, "_prepare_dataloader", lambda dataloader, shuffle, mode: dataloader)
