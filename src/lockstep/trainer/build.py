"""The lightning Trainer of a run: the config's arguments, and what lockstep adds to every run."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.loggers import Logger

from lockstep.checkpoint import CheckpointCallback, CheckpointWriter
from lockstep.core import UsageError
from lockstep.distributed import SignalReceiver
from lockstep.monitoring import (
    CsvMetricsLogger,
    NanGuard,
    ProgressBar,
    StatusReporter,
    ThroughputMonitor,
    WandbRunLogger,
    Watchdog,
    is_interactive,
)
from lockstep.runs import Run
from lockstep.strategies import AnyStrategy, DeepSpeed
from lockstep.trainer.activation_checkpointing import ActivationCheckpointing
from lockstep.trainer.loops import replace_loops


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` is bf16-mixed on a GPU that computes in bfloat16, else 32-true; anything else is itself."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def build_trainer(
    config: Namespace,
    arguments: Namespace,
    strategy: AnyStrategy,
    run: Run,
    attempt: int,
    signals: SignalReceiver,
    tracked: Callable[[Callable[[], int]], WandbRunLogger | None],
) -> tuple[Trainer, ThroughputMonitor]:
    """The Trainer, and the callback that knows how fast it goes.

    Args:
        config: The whole config, as parsed.
        arguments: Its ``trainer`` part with callbacks, loggers and the like already made.
        strategy: What this rank does with gradients and data.
        run: Where everything goes.
        attempt: Number of this start of the run.
        signals: What this rank is told while it trains.
        tracked: Makes W&B's logger, given what knows the number of steps done.
    """
    given: dict[str, Any] = vars(arguments).copy()
    callbacks = _as_list(given.pop("callbacks"))
    if isinstance(strategy, DeepSpeed):
        for callback in callbacks:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                name = type(callback).__name__
                raise UsageError(f"trainer.callbacks: {name} copies the weights, which ZeRO shares out; use strategy ddp.")
    own_bar = any(isinstance(callback, AnyProgressBar) for callback in callbacks)
    bar = given.pop("enable_progress_bar")
    bar = own_bar or is_interactive() if bar is None else bar
    throughput = ThroughputMonitor()
    world = strategy.sharding.world
    saves = given["enable_checkpointing"] is not False
    options = config.checkpoint
    hang = Watchdog(run, world, attempt, config.run.hang_timeout_seconds)
    writer = CheckpointWriter(run, world, attempt, options, on_wait=hang.reset)
    keeper = CheckpointCallback(run, options, throughput, signals, writer if saves else None)
    given["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)  # lightning's, of one's own
    callbacks += [NanGuard(), throughput, StatusReporter(run, throughput, attempt, not bar, lambda: writer.error), keeper]
    callbacks += [ActivationCheckpointing(config.activation_checkpointing), hang]
    if bar and not own_bar:
        callbacks.append(ProgressBar())
    if given["enable_model_summary"] is None:
        given["enable_model_summary"] = False
    loggers: list[Logger] = [
        CsvMetricsLogger(run.metrics, lambda: trainer.global_step),
        *([wandb] if (wandb := tracked(lambda: trainer.global_step)) is not None else []),
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
    replace_loops(trainer)
    trainer.fit_loop.epoch_loop.on_step_boundary = keeper.on_step_boundary
    return trainer, throughput


def _as_list(value: Any) -> list[Any]:
    """What a config gives as nothing, one thing or several."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
