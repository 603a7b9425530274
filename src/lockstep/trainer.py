"""The lightning Trainer of a run: the config's arguments, and what lockstep adds to every run."""

import warnings
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger

from lockstep.errors import UsageError
from lockstep.loop import LeaveOnSigterm, replace_epoch_loop
from lockstep.monitor import FiniteLoss, ProgressBar, Rates, Status, on_terminal
from lockstep.run import Run
from lockstep.strategy import DDP, SingleDevice
from lockstep.tracking import MetricsFile


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` is bf16-mixed on a GPU that computes in bfloat16, else 32-true; anything else is itself."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def make_trainer(
    config: Namespace, arguments: Namespace, strategy: SingleDevice | DDP, run: Run, attempt: int, wandb: Any
) -> tuple[Trainer, Rates]:
    """The Trainer, and the callback that knows how fast it goes.

    Args:
        config: The whole config, as parsed.
        arguments: Its ``trainer`` part with callbacks, loggers and the like already made.
        strategy: What this rank does with gradients and data.
        run: Where everything goes.
        attempt: Number of this start of the run.
        wandb: W&B's run, on the rank that has one.
    """
    given: dict[str, Any] = vars(arguments).copy()
    callbacks = _as_list(given.pop("callbacks"))
    own_bar = any(isinstance(callback, AnyProgressBar) for callback in callbacks)
    bar = given.pop("enable_progress_bar")
    bar = own_bar or on_terminal() if bar is None else bar
    rates = Rates()
    callbacks += [LeaveOnSigterm(), FiniteLoss(), rates, Status(run, rates, attempt, speak=not bar)]
    if bar and not own_bar:
        callbacks.append(ProgressBar())
    if given["enable_checkpointing"] is not False and not any(isinstance(c, Checkpoint) for c in callbacks):
        callbacks.append(_checkpoints(config, run))
    if given["enable_model_summary"] is None:
        given["enable_model_summary"] = False
    loggers: list[Logger] = [
        MetricsFile(run.metrics),
        *([WandbLogger(experiment=wandb)] if wandb is not None else []),
        *_as_list(given.pop("logger")),
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        try:
            trainer = Trainer(
                **given,
                strategy=strategy,
                num_nodes=strategy.sharding.world.nodes,
                logger=loggers,
                callbacks=callbacks,
                enable_progress_bar=bar,
                use_distributed_sampler=False,
                default_root_dir=run.folder,
            )
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise UsageError(f"trainer: {' '.join(str(error).split())}") from error
    replace_epoch_loop(trainer)
    return trainer, rates


def _checkpoints(config: Namespace, run: Run) -> Callback:
    wanted = config.checkpoint
    return ModelCheckpoint(
        dirpath=run.checkpoints,
        filename="step={step}",
        auto_insert_metric_name=False,
        monitor=wanted.monitor,
        mode=wanted.mode,
        save_top_k=wanted.best if wanted.monitor is not None else 1,
        save_last=True,
    )


def _as_list(value: Any) -> list[Any]:
    """What a config gives as nothing, one thing or several."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
