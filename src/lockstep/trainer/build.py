"""Build the Lightning Trainer of a run."""

import sys
import warnings
from collections.abc import Iterable
from os import environ
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from lockstep.checkpoint import CheckpointCallback, CheckpointWriter, HyperParameters, RestoredWeights
from lockstep.compat.lightning import keep_original_weights
from lockstep.config import REFUSED_TRAINER_CLASSES
from lockstep.core import UsageError, is_terminal
from lockstep.distributed import SignalReceiver
from lockstep.monitoring import (
    ClassifierMedia,
    NanGuard,
    ProgressLine,
    RunLogger,
    StatusReporter,
    Stopwatch,
    ThroughputMonitor,
    Watchdog,
)
from lockstep.strategies import AnyStrategy, DeepSpeed
from lockstep.trainer.activation_checkpointing import ActivationCheckpointing
from lockstep.trainer.context import RunContext
from lockstep.trainer.loops import replace_loops
from lockstep.trainer.saved_config import AttemptConfig


def check_trainer_objects(arguments: Namespace, strategy: AnyStrategy) -> None:
    """Raise UsageError if lockstep or the strategy does not support a callback or logger."""
    for key in ("callbacks", "logger"):
        _check_objects(f"trainer.{key}", _as_list(arguments[key]), strategy)


def _check_objects(key: str, values: Iterable[object], strategy: object) -> None:
    for value in values:
        name = type(value).__name__
        if isinstance(value, LearningRateFinder | BatchSizeFinder | WandbLogger):
            base = next(cls.__name__ for cls in type(value).__mro__ if cls.__name__ in REFUSED_TRAINER_CLASSES)
            raise UsageError(f"{key}: {name} {REFUSED_TRAINER_CLASSES[base]}.")
        if isinstance(strategy, DeepSpeed) and isinstance(value, WeightAveraging | StochasticWeightAveraging | ModelPruning):
            raise UsageError(f"{key}: {name} copies the weights, which ZeRO partitions; use strategy ddp.")


class _ModuleCallbacks(Callback):
    """Checks the callbacks that the module's ``configure_callbacks`` has added."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if is_overridden("configure_callbacks", pl_module):
            _check_objects("configure_callbacks", trainer.callbacks, trainer.strategy)  # type: ignore[attr-defined]


def build_trainer(
    context: RunContext,
    arguments: Namespace,
    strategy: AnyStrategy,
    logger: RunLogger,
    stopwatch: Stopwatch,
    signals: SignalReceiver,
    attempt_config: AttemptConfig,
) -> tuple[Trainer, CheckpointCallback]:
    """Build the Trainer of a run from the config and what lockstep adds to every run; return also its checkpoint callback.

    Args:
        arguments: The ``trainer`` part of the config, with callbacks, loggers and the like instantiated.
        logger: lockstep's logger, which precedes those of the config.

    Raises:
        UsageError: Lightning rejects the arguments.
    """
    run, config, options = context.run, context.config, context.config.checkpoint
    given: dict[str, Any] = vars(arguments).copy()
    callbacks = _as_list(given.pop("callbacks"))
    for callback in callbacks:
        if isinstance(callback, ModelPruning):
            keep_original_weights(callback)
    has_own_bar = any(isinstance(callback, AnyProgressBar) for callback in callbacks)
    asked = given.pop("enable_progress_bar")
    is_live = asked is not False and not has_own_bar and is_terminal(sys.stderr, environ)
    has_bar = has_own_bar or (asked is True and not is_live)  # Lightning's bar in a file, where the config asks for it
    watchdog = Watchdog(run, context.world, context.attempt, config.run.hang_timeout_seconds, context.enter)
    saves = context.command == "fit" and given["enable_checkpointing"] is not False
    writer = CheckpointWriter(run, context.world, context.attempt, options, signals, watchdog.reset) if saves else None
    checkpoints = CheckpointCallback(context.ownership, options, stopwatch, signals, writer)
    restored, throughput = RestoredWeights(), ThroughputMonitor()
    given["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)  # Lightning's own
    status = StatusReporter(
        run, throughput, context.attempt, not has_bar, not has_bar and not is_live, lambda: writer.error if writer else ""
    )
    callbacks += [
        _ModuleCallbacks(),
        stopwatch,
        NanGuard(),
        throughput,
        status,
        checkpoints,
        restored,
        HyperParameters(attempt_config.content),
        attempt_config,
        ActivationCheckpointing(config.activation_checkpointing),
        watchdog,
        ClassifierMedia(config.wandb.mode != "disabled"),
        *([ProgressLine(status)] if is_live else []),
    ]
    given["enable_model_summary"] = bool(given["enable_model_summary"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        try:
            trainer = Trainer(
                **given | {"logger": [logger, *_as_list(given["logger"])]},
                strategy=strategy,
                num_nodes=context.world.nodes,
                callbacks=callbacks,
                enable_progress_bar=has_bar,
                use_distributed_sampler=False,
                default_root_dir=run.folder,
            )
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise UsageError(f"trainer: {' '.join(str(error).split())}") from error
    loop = replace_loops(trainer)
    loop.epoch_loop.on_step_boundary, loop.epoch_loop.on_should_stop = checkpoints.on_step_boundary, checkpoints.settle_stop
    loop.on_resume, loop.on_end = restored.check, checkpoints.on_fit_loop_end
    return trainer, checkpoints


def _as_list(value: Any) -> list[Any]:
    """Normalize to a list what a config may set to null, a boolean, one object or a list."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
