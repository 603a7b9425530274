"""One training, from a config to its result: ``python -m lockstep.cli train [fit|validate|test|predict] --config FILE …``."""

import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from os import environ
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden

from lockstep.checkpoint import Checkpoint, CheckpointCallback, allow_numpy_globals, find_checkpoint, latest_checkpoint
from lockstep.core import (
    Interrupted,
    LockstepError,
    RunError,
    Stopped,
    UsageError,
    World,
    atomic_write_json,
    atomic_write_text,
    setup_logging,
)
from lockstep.data import DataSharding
from lockstep.distributed import (
    SignalReceiver,
    all_gather,
    broadcast_from_rank_zero,
    destroy_process_group,
    enable_flight_recorder,
    init_process_group,
    local_devices,
)
from lockstep.monitoring import (
    CsvMetricsLogger,
    ThroughputMonitor,
    WandbRunLogger,
    draw_report,
    start_wandb_logger,
    summary_lines,
    sync_command,
    weights_sha256,
)
from lockstep.runs import Run, read_attempts, read_first_failure, update_status
from lockstep.strategies import LockstepStrategy, load_ops, make_strategy, private_folder, required_ops
from lockstep.trainer.build import build_trainer, resolve_precision
from lockstep.trainer.config_parser import dump_config, instantiate, parse_config, split_command
from lockstep.trainer.loops import FitLoop
from lockstep.trainer.predictions import run_prediction

log = logging.getLogger(__name__)  # as __main__ too


def run_rank(command: str, arguments: Sequence[str], world: World, run: Run, attempt: int) -> None:
    """Parse ``arguments`` and train; the entry point of a Slurm task."""
    train(command, *parse_config(arguments), world, run, attempt)


def train(
    command: str,
    parser: ArgumentParser,
    config: Namespace,
    world: World,
    run: Run | None = None,
    attempt: int = 1,
) -> dict[str, Any]:
    """Carry out ``command`` on this rank, together with all others, and return what ``result.json`` says.

    Args:
        command: fit, validate, test or predict.
        parser: Makes the classes that ``config`` names.
        config: As ``parse`` gave it.
        world: This rank's place.
        run: The run's folder, where a launcher has made one; else rank zero makes it.
        attempt: Number of this start of the run.
    """
    devices = local_devices(world, config.trainer.accelerator)
    config.trainer.precision = resolve_precision(config.trainer.precision, devices[world.local_rank])
    if run is not None:
        enable_flight_recorder(run.log(attempt, 0).parent, environ)
    init_process_group(
        world,
        devices[world.local_rank],
        timedelta(minutes=config.distributed.timeout_minutes),
        alone=config.strategy == "deepspeed",
    )
    if run is None:
        run, attempt = broadcast_from_rank_zero(
            lambda: Run.start(config.run.root, config.run.name, sys.argv, world.nodes, world.local_size), world
        )
    setup_logging(world, run.log(attempt, 0))
    if world.is_rank_zero:
        atomic_write_text(run.config, dump_config(parser, config))

    result: dict[str, Any] = {"status": "failed", "command": command, "world_size": world.size, "attempts": attempt}
    result["reasons"] = [ended.reason for ended in read_attempts(run)]
    try:
        load_ops(required_ops(config), world, devices[world.local_rank])
        with private_folder(config.deepspeed.nvme_path if config.strategy == "deepspeed" else None, world) as folder:
            tracked = run_session(command, parser, config, world, devices, run, result, folder)
    except Stopped as stopped:
        name = "Ctrl-C" if stopped.signal == signal.SIGINT else signal.Signals(stopped.signal).name
        result |= {"status": "interrupted", "reason": name, "global_step": stopped.step}
        log.info("stopped by %s after step %d; what is saved goes on from there", name, stopped.step)
        raise Interrupted(128 + stopped.signal) from stopped
    except SystemExit as error:
        # lightning makes one of Ctrl-C; a signal before training began is ours; any other is of the user's own code.
        interrupted = isinstance(error, Interrupted)
        if not interrupted and not isinstance(error.__context__, KeyboardInterrupt):
            ended = RunError(f"The run was ended by sys.exit({error.code!r}).")
            result["reason"] = ended.message
            raise ended from error
        result |= {"status": "interrupted", "reason": "SIGTERM" if interrupted and error.code == 143 else "Ctrl-C"}
        raise Interrupted(error.code if interrupted else 130) from error
    except BaseException as error:
        result["reason"] = error.message if isinstance(error, LockstepError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        if world.is_rank_zero:
            first = read_first_failure(run, attempt)
            if result["status"] != "finished" and first and not first.interrupted:
                # What rank zero saw is only that a peer was gone, or the signal that ends the job because of it.
                result |= {"status": "failed", "reason": first.reason}
            try:
                atomic_write_json(run.result, result)
                update_status(run, result["status"])
            except OSError as error:  # a full disk must not make a crash of a stop
                log.warning("%s could not be written (%s)", run.result, error.strerror)
    if world.is_rank_zero:
        draw_report(run)
        for line in summary_lines(run, result, tracked):
            log.info(line)
    destroy_process_group()
    return result


def run_session(
    command: str,
    parser: ArgumentParser,
    config: Namespace,
    world: World,
    devices: list[torch.device],
    run: Run,
    result: dict[str, Any],
    folder: Path | None,
) -> str:
    """Make everything, carry out ``command``, and fill in ``result`` also where that fails; offload into ``folder``.

    Returns:
        Where W&B has the run: its address, what uploads it, or that W&B is off.
    """
    allow_numpy_globals()
    if config.ckpt_path is None and command != "fit":
        raise UsageError(f"ckpt_path: must be set to {command}: a checkpoint, or a run folder.")
    given = None if config.ckpt_path is None else find_checkpoint(Path(config.ckpt_path), "ckpt_path")
    own = broadcast_from_rank_zero(lambda: latest_checkpoint(run.checkpoints), world) if command == "fit" else None
    seed_everything(config.seed_everything, verbose=False)
    made = instantiate(parser, config)
    made.data.prepare_data_per_node = not config.shared_filesystem
    strategy = make_strategy(config, devices, DataSharding(world, config.seed_everything), folder)
    content, signals = yaml.safe_load(dump_config(parser, config)), SignalReceiver()
    tracked: WandbRunLogger | None = None
    preempted = False

    def track(step: Callable[[], int]) -> WandbRunLogger | None:
        nonlocal tracked
        tracked = start_wandb_logger(run, config.wandb, content, world, step)
        return tracked

    try:
        trainer, throughput = build_trainer(config, made.trainer, strategy, run, result["attempts"], signals, track)
        if isinstance(start := own or given, Checkpoint) and command == "fit":
            resume(trainer, throughput, start, same_run=own is not None)
        began = time.monotonic()
        try:
            with signals.installed():
                checkpoint = lightning_path(own or given)
                if command == "predict":
                    result |= {
                        "metrics": {},
                        **run_prediction(trainer, made.model, made.data, checkpoint, run, result["attempts"]),
                    }
                else:
                    result["metrics"] = run_command(
                        command, trainer, made.model, made.data, checkpoint, config.run.test_after_fit
                    )
        except MisconfigurationException as error:
            raise RunError(" ".join(str(error).split())) from error
        finally:
            total = time.monotonic() - began
            result["global_step"], result["epochs"] = trainer.global_step, trainer.current_epoch
            lost = sum(callback.seconds_lost for callback in callbacks_of(trainer) if isinstance(callback, CheckpointCallback))
            result["seconds"] = {
                "training": round(throughput.train_seconds, 3),
                "total": round(total, 3),
                "lost": round(lost, 3),
            }
        result["weights_sha256"] = weights_sha256(strategy.full_weights(), world)
        result["skipped_files"] = len(set().union(*all_gather(getattr(made.data, "skipped", set()), world)))
        result["status"] = "finished"
    except Stopped:
        preempted = True
        raise
    finally:
        if tracked is not None:
            tracked.close(0 if result["status"] == "finished" else 1, preempted)
    if tracked is None:
        return "off"
    return tracked.url or sync_command(run)


def resume(trainer: Trainer, throughput: ThroughputMonitor, checkpoint: Checkpoint, same_run: bool) -> None:
    """Let ``trainer`` begin where ``checkpoint`` was saved; what it logs again is not written again in the same run."""
    strategy, progress = trainer.strategy, checkpoint.manifest.progress
    assert isinstance(strategy, LockstepStrategy) and isinstance(trainer.fit_loop, FitLoop)
    point = checkpoint.resume_point(strategy.sharding.world, strategy.sharding.seed)
    strategy.resume_from(point)
    trainer.fit_loop.resume_point = point
    if same_run:
        throughput.train_seconds = progress.train_seconds
        for part in (*trainer.loggers, *callbacks_of(trainer)):
            if isinstance(part, CsvMetricsLogger | WandbRunLogger):
                part.row_count = progress.metric_rows
            elif isinstance(part, CheckpointCallback):
                part.resume(progress)
    log.info("going on from step %d (epoch %d, batch %d)", progress.step, progress.epoch, progress.batch)


def callbacks_of(trainer: Any) -> list[Callback]:
    """All callbacks of a Trainer, which its type does not tell."""
    callbacks: list[Callback] = trainer.callbacks
    return callbacks


def lightning_path(checkpoint: Checkpoint | Path | None) -> str | None:
    """The file that lightning loads."""
    return None if checkpoint is None else str(checkpoint.model if isinstance(checkpoint, Checkpoint) else checkpoint)


def run_command(
    command: str, trainer: Trainer, module: LightningModule, data: LightningDataModule, checkpoint: str | None, test: bool
) -> dict[str, float]:
    """Fit and test, or only evaluate; return the newest value of every metric."""
    if command == "fit":
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        metrics = dict(trainer.logged_metrics)
        if test and is_overridden("test_step", module) and is_overridden("test_dataloader", data):
            trainer.test(module, datamodule=data, verbose=False)
            metrics |= trainer.logged_metrics
    else:
        evaluate = trainer.validate if command == "validate" else trainer.test
        evaluate(module, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
        metrics = dict(trainer.logged_metrics)
    return {name: float(value) for name, value in sorted(metrics.items())}


def main(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Train as the rank that ``env`` describes and return the exit status: 0, 1 (failed while running) or 2 (usage).

    Any exception but a ``LockstepError`` goes on to the caller, with its own traceback.
    """
    world = World()
    try:
        world = World.from_env(env)
        command, keys = split_command(arguments)
        train(command, *parse_config(keys), world)
        return 0
    except LockstepError as error:
        if world.local_rank == 0 or error.exit_status == RunError.exit_status:
            print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
