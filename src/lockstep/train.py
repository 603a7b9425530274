"""One training, from a config to its result: ``python -m lockstep.train [fit|validate|test|predict] --config FILE …``."""

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

from lockstep.checkpoint import Checkpoint, find_checkpoint, newest
from lockstep.config import as_text, make_objects, parse, split_command
from lockstep.disk import replace_text, write_whole
from lockstep.errors import Interrupted, LockstepError, RunError, Stopped, UsageError
from lockstep.failure import attempts, first_failure
from lockstep.group import devices_of_node, from_rank_zero, join, leave, on_all_ranks, trace_collectives
from lockstep.keep import Keeper
from lockstep.logs import start_logging
from lockstep.loop import FitLoop, Resumed
from lockstep.metrics import MetricsFile
from lockstep.monitor import Rates
from lockstep.nvme import own_folder
from lockstep.ops import load_ops, ops_of
from lockstep.order import Position, Sharding, mix
from lockstep.predict import predict
from lockstep.report import draw, five_lines, weights_sha256
from lockstep.run import Run, update_status
from lockstep.state import allow_numpy
from lockstep.stop import Signals
from lockstep.strategy import make_strategy
from lockstep.tracking import Tracked, start_tracking, sync_command
from lockstep.trainer import make_trainer, resolve_precision
from lockstep.world import World

log = logging.getLogger("lockstep.train")  # as __main__ too


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
    devices = devices_of_node(world, config.trainer.accelerator)
    config.trainer.precision = resolve_precision(config.trainer.precision, devices[world.local_rank])
    if run is not None:
        trace_collectives(run.log(attempt, 0).parent, environ)
    join(world, devices[world.local_rank], timedelta(minutes=config.ddp.timeout_minutes), alone=config.strategy == "deepspeed")
    if run is None:
        run, attempt = from_rank_zero(
            lambda: Run.start(config.run.root, config.run.name, sys.argv, world.nodes, world.local_size), world
        )
    start_logging(world, run.log(attempt, 0))
    if world.is_zero:
        replace_text(run.config, as_text(parser, config))

    result: dict[str, Any] = {"status": "failed", "command": command, "world_size": world.size, "attempts": attempt}
    result["reasons"] = [ended.reason for ended in attempts(run)]
    try:
        load_ops(ops_of(config), world, devices[world.local_rank])
        with own_folder(config.deepspeed.nvme_path if config.strategy == "deepspeed" else None, world) as folder:
            tracked = work(command, parser, config, world, devices, run, result, folder)
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
            result["reason"] = ended.sentence
            raise ended from error
        result |= {"status": "interrupted", "reason": "SIGTERM" if interrupted and error.code == 143 else "Ctrl-C"}
        raise Interrupted(error.code if interrupted else 130) from error
    except BaseException as error:
        result["reason"] = error.sentence if isinstance(error, LockstepError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        if world.is_zero:
            first = first_failure(run, attempt)
            if result["status"] != "finished" and first and not first.interrupted:
                # What rank zero saw is only that a peer was gone, or the signal that ends the job because of it.
                result |= {"status": "failed", "reason": first.reason}
            try:
                write_whole(run.result, result)
                update_status(run, result["status"])
            except OSError as error:  # a full disk must not make a crash of a stop
                log.warning("%s could not be written (%s)", run.result, error.strerror)
    if world.is_zero:
        draw(run)
        for line in five_lines(run, result, tracked):
            log.info(line)
    leave()
    return result


def work(
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
    allow_numpy()
    if config.ckpt_path is None and command != "fit":
        raise UsageError(f"ckpt_path: must be set to {command}: a checkpoint, or a run folder.")
    given = None if config.ckpt_path is None else find_checkpoint(Path(config.ckpt_path), "ckpt_path")
    own = from_rank_zero(lambda: newest(run.checkpoints), world) if command == "fit" else None
    seed_everything(config.seed_everything, verbose=False)
    made = make_objects(parser, config)
    made.data.prepare_data_per_node = not config.shared_filesystem
    strategy = make_strategy(config, devices, Sharding(world, config.seed_everything), folder)
    content, signals = yaml.safe_load(as_text(parser, config)), Signals()
    tracked: Tracked | None = None
    preempted = False

    def track(step: Callable[[], int]) -> Tracked | None:
        nonlocal tracked
        tracked = start_tracking(run, config.wandb, content, world, step)
        return tracked

    try:
        trainer, rates = make_trainer(config, made.trainer, strategy, run, result["attempts"], signals, track)
        if isinstance(start := own or given, Checkpoint) and command == "fit":
            go_on(trainer, rates, start, same_run=own is not None)
        began = time.monotonic()
        try:
            with signals.heard():
                checkpoint = path_of(own or given)
                if command == "predict":
                    result |= {"metrics": {}, **predict(trainer, made.model, made.data, checkpoint, run, result["attempts"])}
                else:
                    result["metrics"] = carry_out(command, trainer, made.model, made.data, checkpoint, config.run.test)
        except MisconfigurationException as error:
            raise RunError(" ".join(str(error).split())) from error
        finally:
            total = time.monotonic() - began
            result["global_step"], result["epochs"] = trainer.global_step, trainer.current_epoch
            lost = sum(callback.lost for callback in callbacks_of(trainer) if isinstance(callback, Keeper))
            result["seconds"] = {"training": round(rates.train_seconds, 3), "total": round(total, 3), "lost": round(lost, 3)}
        result["weights_sha256"] = weights_sha256(strategy.whole_weights(), world)
        result["skipped_files"] = len(set().union(*on_all_ranks(getattr(made.data, "skipped", set()), world)))
        result["status"] = "finished"
    except Stopped:
        preempted = True
        raise
    finally:
        if tracked is not None:
            tracked.close(0 if result["status"] == "finished" else 1, preempted)
    if tracked is None:
        return "off"
    return tracked.place or sync_command(run)


def go_on(trainer: Trainer, rates: Rates, checkpoint: Checkpoint, same_run: bool) -> None:
    """Let ``trainer`` begin where ``checkpoint`` was saved; what it logs again is not written again in the same run."""
    strategy: Any = trainer.strategy
    world, facts = strategy.sharding.world, checkpoint.facts
    strategy.ready_order = facts["ready"]
    seed = mix(strategy.sharding.seed, checkpoint.step, world.rank) >> 1
    position = Position(int(facts["epoch"]), int(facts["batch"]))
    assert isinstance(trainer.fit_loop, FitLoop)
    trainer.fit_loop.resumed = Resumed(position, checkpoint.states_for(world), seed)
    if same_run:
        rates.train_seconds = float(facts["seconds"])
        for part in (*trainer.loggers, *callbacks_of(trainer)):
            if isinstance(part, MetricsFile | Tracked):
                part.rows = int(facts["rows"])
            elif isinstance(part, Keeper):
                part.go_on(facts)
    log.info("going on from step %d (epoch %d, batch %d)", checkpoint.step, position.epoch, position.batch)


def callbacks_of(trainer: Any) -> list[Callback]:
    """All callbacks of a Trainer, which its type does not tell."""
    callbacks: list[Callback] = trainer.callbacks
    return callbacks


def path_of(checkpoint: Checkpoint | Path | None) -> str | None:
    """The file that lightning loads."""
    return None if checkpoint is None else str(checkpoint.model if isinstance(checkpoint, Checkpoint) else checkpoint)


def carry_out(
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
        train(command, *parse(keys), world)
        return 0
    except LockstepError as error:
        if world.local_rank == 0 or error.exit_status == RunError.exit_status:
            print(f"lockstep: {error.sentence}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], environ))
