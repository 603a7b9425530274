"""One attempt of a run on one rank, from a config to its result."""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden

from lockstep.checkpoint import (
    Checkpoint,
    CheckpointCallback,
    allow_numpy_globals,
    allow_plain_classes,
    find_checkpoint,
    latest_checkpoint,
    read_checkpoint,
)
from lockstep.config import check_not_local, check_start, split_command, with_config
from lockstep.config.validation import shows_only, validate_arguments
from lockstep.core import (
    FinalTestError,
    LockstepError,
    PeerError,
    RunError,
    Stopped,
    StorageError,
    Superseded,
    UsageError,
    World,
    setup_logging,
)
from lockstep.data import ImageFolder
from lockstep.data.loading import DataSharding
from lockstep.distributed import SignalReceiver, all_gather, breakpoints, broadcast_from_rank_zero, destroy_process_group
from lockstep.monitoring import RunLogger, Stopwatch, report, start_run_logger, stop_watchdog
from lockstep.runs import (
    Evidence,
    Failure,
    Run,
    RunResult,
    claim_heartbeat,
    classify_ending,
    describe_run,
    is_connection_loss,
    read_attempts,
    read_first_failure,
    record_failure,
    signal_name,
    update_status,
    write_trained_result,
)
from lockstep.strategies import AnyStrategy, load_ops, make_strategy, private_folder, required_ops
from lockstep.trainer.build import build_trainer, check_trainer_objects
from lockstep.trainer.config_parser import instantiate, parse_config, set_optimizer
from lockstep.trainer.context import RunContext
from lockstep.trainer.errors import normalize_error
from lockstep.trainer.loops import FitLoop
from lockstep.trainer.predictions import run_prediction
from lockstep.trainer.preload import copy_shards
from lockstep.trainer.saved_config import AttemptConfig

log = logging.getLogger(__name__)

_JOIN_SECONDS = 20.0
"""How long a rank whose final test failed waits for the others to fail too."""


class TrainingSession:
    """One attempt of a run on one rank. Every rank of the world must run one."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.signals = SignalReceiver()
        self.stopwatch = Stopwatch(context.run, context.attempt)
        self.trainer: Trainer | None = None
        self.checkpoints: CheckpointCallback | None = None
        self.logger: RunLogger | None = None
        self.config = AttemptConfig(context)

    def run(self) -> RunResult:
        """Run the command together with all other ranks, and write ``result.json`` on rank zero.

        Raises:
            Interrupted: A signal ended the run.
            LockstepError: A usage error, or an error with a known remedy.
            Exception: Whatever user code raises.
        """
        context = self.context
        setup_logging(context.world, context.run.log(context.attempt))
        try:
            self.config.begin()
            debugger = breakpoints(context.world, context.one_rank_command, lambda: stop_watchdog(self.trainer))
            with claim_heartbeat(context.run, context.attempt) if context.world.is_rank_zero else nullcontext(), debugger:
                result = self._execute()
            self.config.adopt()
            if context.world.is_rank_zero:
                context.ownership.check_now()
        except BaseException as error:
            raised = normalize_error(error)
            failure = Failure.from_exception(raised, context.world)
            ending = classify_ending(Evidence(failure=failure))
            reason = signal_name(failure.exit_status) if failure.is_interruption else ending.reason
            self._write(self._result(ending.state, reason, failure.exit_status), failure)
            if raised is error:
                raise
            raise raised from error
        self._write(result)
        if context.world.is_rank_zero:
            report.draw(context.run)
            for line in report.summary_lines(context.run, result, self.logger.location if self.logger is not None else "off"):
                log.info(line)
        destroy_process_group()
        return result

    def _execute(self) -> RunResult:
        """Prepare what the strategy needs on this node, train, and close the loggers."""
        context, config = self.context, self.context.config
        context.enter("compile")
        load_ops(required_ops(config), context.world, context.device)
        context.enter("model")
        nvme = config.deepspeed.nvme_path if config.strategy == "deepspeed" else None
        is_finished = is_preempted = False
        try:
            with private_folder(nvme, context.world) as folder:
                result = self._train(folder)
            is_finished = True
            return result
        except Stopped:
            is_preempted = True
            raise
        except FinalTestError:
            is_finished = True
            raise
        finally:
            context.enter("closing")
            if self.logger is not None:
                with closing(self.logger.metrics):
                    if not context.run.is_superseded(context.attempt):
                        self.logger.close(0 if is_finished or context.run.finished_before(context.attempt) else 1, is_preempted)

    def _train(self, nvme_folder: Path | None) -> RunResult:
        """Build the objects of the config, run the command, and collect the result."""
        context, config = self.context, self.context.config
        allow_numpy_globals()
        checkpoint, is_same_run = self._find_checkpoint()
        seed_everything(config.seed_everything, verbose=False)
        objects = instantiate(context.parser, config)
        if not any(is_overridden(f"{name}_dataloader", objects.data) for name in ("train", "val", "test", "predict")):
            objects.data = None  # the module has its own loaders, which Lightning uses only without a DataModule
        for part in filter(None, (objects.model, objects.data)):
            part.prepare_data_per_node = not config.shared_filesystem
        if isinstance(objects.data, ImageFolder):
            objects.data.index_folder = context.run.folder / "data"
        set_optimizer(objects.model, config)
        pins = any(device.type == "cuda" for device in context.devices)
        sharding = DataSharding(context.world, config.seed_everything, pins)
        strategy = make_strategy(config, context.devices, sharding, nvme_folder)
        check_trainer_objects(objects.trainer, strategy)
        content, saved = self.config.content, self.config.saved
        self.logger = start_run_logger(
            context.run, config.wandb, content, context.world, self.global_step, context.ownership, saved
        )
        self.trainer, self.checkpoints = build_trainer(
            context, objects.trainer, strategy, self.logger, self.stopwatch, self.signals, self.config
        )
        if isinstance(checkpoint, Checkpoint) and context.command == "fit":
            self._resume(strategy, checkpoint, is_same_run)
        context.enter("data")
        path = None if checkpoint is None else str(checkpoint.model if isinstance(checkpoint, Checkpoint) else checkpoint)
        if path is not None:
            allow_plain_classes(Path(path))
        outcome: dict[str, Any] = {"metrics": {}}
        try:
            with self.signals.installed():
                if context.command == "predict":
                    outcome["samples"] = run_prediction(context, self.trainer, objects.model, objects.data, path)
                    outcome["predictions"] = str(context.run.predictions)
                elif context.command == "fit":
                    outcome = self._fit(self.trainer, objects.model, objects.data, path)
                else:
                    outcome["metrics"] = self._evaluate(self.trainer, objects.model, objects.data, path)
        except MisconfigurationException as error:
            raise RunError(" ".join(str(error).split())) from error
        except RuntimeError as error:
            if not str(error).startswith("Error while merging hparams"):
                raise
            raise UsageError(f"{error} Rename them in one, or call its save_hyperparameters with logger=False.") from error
        if context.command != "fit":
            outcome["checkpoint"] = str(checkpoint.folder if isinstance(checkpoint, Checkpoint) else checkpoint)
            outcome["weights_sha256"] = report.weights_sha256(strategy.full_weights(), context.world)
        skipped = all_gather(objects.data.skipped if isinstance(objects.data, ImageFolder) else set(), context.world)
        return replace(self._result("finished"), skipped_files=len(set().union(*skipped)), **outcome)

    def _find_checkpoint(self) -> tuple[Checkpoint | Path | None, bool]:
        """Return the checkpoint to start from, and whether it is one of this run."""
        context, path = self.context, self.context.config.ckpt_path
        if path is None and context.command != "fit":
            raise UsageError(f"ckpt_path: must be set to {context.command}: a checkpoint, or a run folder.")
        own = latest_checkpoint(context.run.checkpoints, context.world, set_aside=True) if context.command == "fit" else None
        found = own if own is not None or path is None else find_checkpoint(Path(path), "ckpt_path", context.world)
        return found, own is not None

    def _resume(self, strategy: AnyStrategy, checkpoint: Checkpoint, is_same_run: bool) -> None:
        """Restore progress from ``checkpoint``; in the same run also the row count, so that no row is logged twice."""
        trainer, progress = self.trainer, checkpoint.manifest.progress
        assert trainer is not None and isinstance(trainer.fit_loop, FitLoop)
        assert self.checkpoints is not None and self.logger is not None
        point = checkpoint.resume_point(self.context.world, self.context.config.seed_everything)
        if not is_same_run:  # what stopped the other run need not stop this one
            point = replace(point, should_stop=False)
        strategy.resume_from(point)
        trainer.fit_loop.resume_point = point
        if is_same_run:
            self.checkpoints.resume(checkpoint)
            self.logger.begin_resume(progress.metric_rows, progress.wandb_position)
        log.info("resuming from step %d (epoch %d, batch %d)", progress.step, progress.epoch, progress.batch)

    def _fit(
        self, trainer: Trainer, module: LightningModule, data: LightningDataModule | None, checkpoint: str | None
    ) -> dict[str, Any]:
        """Fit and test; return what the result says about both."""
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        sha256 = self._saved_weights_sha256()
        metrics, test_error = dict(trainer.logged_metrics), None
        can_test = is_overridden("test_step", module) and is_overridden("test_dataloader", data or module)
        if self.context.config.run.test_after_fit and can_test:
            if self.context.world.is_rank_zero:
                trained = replace(self._result("finished"), metrics=_as_floats(metrics), weights_sha256=sha256)
                trained.write(self.context.run.trained_result(self.context.attempt))
            try:
                trainer.test(module, datamodule=data, verbose=False)
                metrics |= trainer.logged_metrics
            except Superseded:
                raise
            except Exception as error:  # in user code; the training has finished in any case
                if isinstance(error, PeerError) or is_connection_loss(error):
                    raise
                test_error = f"{type(error).__name__}: {' '.join(str(error).split())}"
                log.error("the weights are trained and saved, but their final test failed", exc_info=error)
                assert self.checkpoints is not None
                if not self.checkpoints.joins_all_ranks(_JOIN_SECONDS):  # the others wait for this rank in their test
                    failed = FinalTestError(f"The weights are trained and saved, but their final test failed: {test_error}")
                    failure = Failure.from_exception(failed, self.context.world)
                    record_failure(self.context.run, self.context.attempt, failure)
                    raise failed from error
        return {"metrics": _as_floats(metrics), "weights_sha256": sha256, "test_error": test_error}

    def _evaluate(
        self, trainer: Trainer, module: LightningModule, data: LightningDataModule | None, checkpoint: str | None
    ) -> dict[str, float]:
        """Validate or test; return the newest value of every metric."""
        evaluate = trainer.validate if self.context.command == "validate" else trainer.test
        evaluate(module, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
        return _as_floats(trainer.logged_metrics)

    def _saved_weights_sha256(self) -> str | None:
        """SHA-256 of the trained weights, as the published checkpoint has them; None without checkpoints.

        Raises:
            StorageError: The checkpoint cannot be read.
        """
        world = self.context.world
        if self.checkpoints is None or (writer := self.checkpoints.writer) is None:
            return None
        published = broadcast_from_rank_zero(lambda: writer.published, world)
        found = None if published is None else read_checkpoint(published, world)
        if found is None:
            raise StorageError(f"The checkpoint {published} of the trained weights is gone or damaged; resume the run.")
        if not world.is_rank_zero:
            return None
        allow_plain_classes(found.model)
        return report.weights_sha256(found.weights(), world)

    def global_step(self) -> int:
        """Number of optimizer steps so far."""
        return self.trainer.global_step if self.trainer is not None else 0

    def _result(self, status: str, reason: str | None = None, exit_status: int = 0) -> RunResult:
        """The result, with what is known so far."""
        context = self.context
        reasons = [attempt.reason or "It finished." for attempt in read_attempts(context.run)]
        result = RunResult(status, context.command, context.world.size, context.attempt, reasons, reason, exit_status)
        result = replace(describe_run(context.run, result), host=os.uname().nodename, seconds=self.stopwatch.durations())
        if self.trainer is None or self.checkpoints is None:
            return result
        writer, step, epochs = self.checkpoints.writer, self.trainer.global_step, self.trainer.current_epoch
        return replace(result, global_step=step, epochs=epochs, **(writer.summary() if writer is not None else {}))

    def _write(self, result: RunResult, own: Failure | None = None) -> None:
        """Write the result on rank zero; the cause is the recorded failure of the first failed rank, or else ``own``."""
        run = self.context.run
        if not self.context.world.is_rank_zero or run.is_superseded(self.context.attempt):
            return
        failure = read_first_failure(run, self.context.attempt) or own
        if failure is not None and write_trained_result(run, self.context.attempt, failure):
            return
        if not result.is_finished and failure is not None and failure.is_cause:
            ending = classify_ending(Evidence(result, failure))
            result = replace(result, status=ending.state, reason=ending.reason, exit_status=ending.exit_status)
        try:
            if not (is_kept := not result.is_finished and run.finished_before(self.context.attempt) is not None):
                result.write(run.result)
            update_status(run, "finished" if is_kept else result.status)
            if result.is_finished:
                run.trained_result(self.context.attempt).unlink(missing_ok=True)
        except OSError as error:  # a full disk must not turn a stop into a crash
            log.warning("%s could not be written (%s)", run.result, error.strerror)


def _as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in sorted(metrics.items())}


def train(
    command: str,
    parsed: tuple[ArgumentParser, Namespace],
    world: World,
    run: Run | None = None,
    attempt: int = 1,
    enter: Callable[[str], None] = lambda phase: None,
) -> RunResult:
    """Run one attempt on this rank, together with all others; takes the arguments of ``RunContext.create``."""
    return TrainingSession(RunContext.create(command, parsed, world, run, attempt, enter)).run()


def main(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """Train as the rank of ``env``; return the exit status: 0, 1 (failed) or 2 (usage). Only a LockstepError is caught."""
    world = World()
    try:
        world = World.from_env(env)
        command, keys = split_command(with_config(arguments, default=None))
        check_not_local(keys)
        if not any(map(shows_only, keys)):
            check_start(command, validate_arguments([command, *keys]), [world.size], env)
        parsed = parse_config(keys, command)
        copy_shards(command, parsed[1], world)
        train(command, parsed, world)
        return 0
    except LockstepError as error:
        if world.local_rank == 0 or error.exit_status == RunError.exit_status:
            print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
