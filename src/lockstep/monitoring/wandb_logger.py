"""The logger of a run: ``metrics.csv`` and one W&B run over all restarts, each row once; no W&B error ends training."""

import logging
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lockstep import __version__
from lockstep.config import WandbOptions
from lockstep.core import WANDB_KEY_ADVICE, World, shell_command, wandb_api_key
from lockstep.monitoring.csv_logger import CsvMetricsLogger
from lockstep.monitoring.tensorboard import TensorBoardWriter
from lockstep.monitoring.wandb_client import WandbClient, is_reachable, one_line, sync_command
from lockstep.monitoring.wandb_history import WandbHistory, to_python
from lockstep.runs import METRICS_ROW, LaunchRecord, Ownership, Run

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

_SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_CLUSTER_NAME")

_PREEMPTED_SECONDS = 5.0
"""How long a preempted attempt waits for uploads; the next attempt sends the rest."""

_MAX_STARTS = 3
"""How often W&B's service is restarted after it has died, and how often ``close`` tries to finish the W&B run."""


class RunLogger(WandbLogger):
    """The logger of a run, ``trainer.logger``: writes ``metrics.csv``, and sends each row of it to W&B once.

    What user code logs with ``experiment``, ``log_image`` or ``wandb.log`` is sent once, too. If W&B fails, training
    continues, and ``close`` sends the missing rows of the file.

    Args:
        metrics: The metrics file, in the run folder.
        client: Starts the W&B run; None if W&B is disabled, and on all ranks but zero.
        step: Returns the number of optimizer steps done.
        project: Name of the W&B project.
        check_owner: Called for each row; raises Superseded where this attempt must not write any more.
        tensorboard: Also writes each row of the file; None without TensorBoard.

    Attributes:
        run: The W&B run; None without a client, or if it could not be started.
    """

    run: "wandb.Run | None" = None

    def __init__(
        self,
        metrics: CsvMetricsLogger,
        client: WandbClient | None,
        step: Callable[[], int],
        project: str,
        check_owner: Callable[[], None] = lambda: None,
        tensorboard: TensorBoardWriter | None = None,
    ) -> None:
        self._tensorboard = tensorboard
        self.metrics, self._client, self._step, self._check_owner = metrics, client, step, check_owner
        self._history = WandbHistory(step)
        self._deaths, self._has_failed, self._is_complete = 0, client is None, client is None
        # Set while a resume calls hooks of user code that were called before the checkpoint, too.
        self._resume_position: Sequence[Any] | None = None
        folder = metrics.path.parent
        super().__init__(project=project, save_dir=folder, version=folder.name)
        if client is not None:
            self._try_start()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; on other ranks, and if W&B is disabled or could not be started, an object that ignores all calls."""
        if self.run is None and self._experiment is None:
            self._experiment = _disabled_run()
        return self.run or self._experiment

    @property
    def version(self) -> str:
        """The name of the run folder; callbacks put it into paths, and a disabled W&B run has another id in each attempt."""
        return self.metrics.path.parent.name

    @property
    def url(self) -> str:
        """URL of the W&B run; empty if it is offline or was not started."""
        return "" if self.run is None or self.run.offline else str(self.run.url)

    @property
    def location(self) -> str:
        """URL of the W&B run, the command that uploads it, or ``off``."""
        return self.url or ("off" if self._client is None else sync_command(self._client.run))

    def position(self) -> tuple[int, dict[str, Any]]:
        """The number of the next W&B row and its values so far, for a checkpoint; values that are not plain end the row."""
        if any(not isinstance(value, str | int | float) for value in self._history.pending.values()):
            self._guard(self._history.commit)
        return self._history.next_row, dict(self._history.pending)

    def flush_before_publication(self) -> Callable[[], None]:
        """Return a function that waits until all rows so far are on disk, to be called before their checkpoint is published."""
        if self._client is None or self.run is None or self._has_failed:
            return lambda: None
        return partial(self._client.flush, self._history.sent_at)

    def begin_resume(self, metrics_rows: int, position: Sequence[Any]) -> None:
        """Resume after ``metrics_rows`` rows of the file, at W&B's ``position``; ignore rows until ``finish_resume``."""
        self.metrics.resume(metrics_rows)
        self._resume_position = position
        self._guard(self._send_missing_rows)

    def finish_resume(self) -> None:
        """Log again, from the position where the checkpoint was saved."""
        if self._resume_position is not None:
            self._history.next_row, values = self._resume_position
            self._history.pending = dict(values)
            self._resume_position = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row of numbers to the file and send it; if a value is not a number, only send it."""
        if self._resume_position is not None:
            return
        numbers = {name: to_python(value) for name, value in metrics.items()}
        if not all(isinstance(value, int | float) for value in numbers.values()):
            self.experiment.log(dict(metrics))
            return
        self.metrics.log_metrics(numbers)
        if self._tensorboard is not None:
            self._tensorboard.write(self.metrics.row_count, self._step(), numbers)
        self._guard(lambda: self._history.log_metrics_row(self.metrics.row_count, self._step(), numbers))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Add hyperparameters to the config of the W&B run, which starts with the complete config."""
        if self._client is not None and self.run is not None:
            params = vars(params) if isinstance(params, Namespace) else params
            new = {name: value for name, value in params.items() if name not in self._client.config}
            self._guard(partial(super().log_hyperparams, new))

    def show_config(self, config: Mapping[str, Any]) -> None:
        """Replace the config that W&B shows."""
        if self._client is not None:
            self._client = replace(self._client, config={**self._client.config, **config})
        if (run := self.run) is not None:
            self._guard(lambda: run.config.update(dict(config), allow_val_change=True))  # type: ignore[no-untyped-call]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Do nothing: a test may follow the fit; ``close`` finishes the W&B run."""

    def close(self, exit_code: int, preempted: bool = False) -> bool:
        """Send missing rows, finish the W&B run, and return whether W&B has all of it.

        Args:
            exit_code: Exit code of the run, for W&B.
            preempted: Mark the run as preempting, and do not wait for a slow server.
        """
        self.metrics.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._client is not None:
            closing = threading.Thread(target=self._close, args=(self._client, exit_code, preempted), name="wandb", daemon=True)
            closing.start()
            closing.join(_PREEMPTED_SECONDS if preempted else None)
        return self._is_complete

    def _close(self, client: WandbClient, exit_code: int, preempted: bool) -> None:
        for attempt in range(1, _MAX_STARTS + 1):
            try:
                self._finish(client, exit_code, preempted)
                self._is_complete = True
                return
            except Exception as error:  # W&B must not end a run, and the rows are in the file
                self._has_failed = True
                # A ConnectionError means that W&B's service has died; it can be started again.
                if attempt == _MAX_STARTS or not isinstance(error, ConnectionError):
                    command = shell_command("sync", client.run.folder)
                    log.warning("W&B does not have all metrics (%s); send the rest with: %s", one_line(error), command)
                    return

    def _finish(self, client: WandbClient, exit_code: int, preempted: bool) -> None:
        run = self.run
        is_offline = run is not None and run.offline and client.online and not preempted
        is_back = is_offline and run is not None and is_reachable(run.settings.base_url)
        if run is not None and is_back and not self._has_failed:
            run.finish()
        if is_back or self._has_failed:
            self._start()
        run = self.run
        assert run is not None
        if preempted:
            run.mark_preempting()
        elif exit_code == 0:  # else the run may resume in the middle of a row
            self._history.commit()
        run.finish(exit_code=exit_code)
        # W&B's service does not report rows that a full disk has lost, and does not write more when there is space again.
        if run.offline and not preempted and (found := client.metrics_rows_on_disk()) < self._history.metrics_rows:
            raise ConnectionError(f"its files have {found} of {self._history.metrics_rows} rows")

    def _start(self) -> None:
        """Start the W&B run and send it the rows that it lacks."""
        assert self._client is not None
        self.run, end, metrics_rows = self._client.start()
        self._history.attach(self.run, end, metrics_rows, self._log_user_row)
        self._send_missing_rows()
        self._has_failed = False

    def _try_start(self) -> None:
        """Start W&B, and retry if its service dies; an error of W&B does not end the run."""
        while True:
            try:
                self._start()
                return
            except Exception as error:
                self._deaths += 1
                if self._deaths > _MAX_STARTS or not isinstance(error, ConnectionError):
                    self._fail("cannot be started", error)
                    return

    def _fail(self, what: str, error: Exception) -> None:
        self._has_failed = True
        rest = "training continues, and all metrics are sent at the end, but not what other code logs to W&B meanwhile"
        log.warning("W&B %s (%s); %s", what, one_line(error), rest)

    def _guard(self, send: Callable[[], None]) -> None:
        """Call ``send`` unless W&B has failed; an error of W&B does not end the run."""
        if self._has_failed:
            return
        self._check_owner()
        try:
            send()
        except (TypeError, ValueError):  # what user code logs is wrong
            raise
        except ConnectionError as error:
            log.warning(
                "W&B's service has ended (%s), as signals to a job end it too; lockstep restarts it, and no metric is lost",
                one_line(error),
            )
            self._try_start()
        except Exception as error:
            self._fail("failed", error)

    def _log_user_row(self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        if self._resume_position is None:
            self._guard(lambda: self._send_user_row(data, step, commit))

    def _send_user_row(self, data: Mapping[str, Any], step: int | None, commit: bool | None) -> None:
        import wandb

        try:
            self._history.log_user_row(data, step, commit)
        except ConnectionError:
            raise
        except (OSError, wandb.Error) as error:  # such as an image for which the disk has no space
            log.warning("W&B cannot log %s (%s); training continues without it", ", ".join(data), one_line(error))

    def _send_missing_rows(self) -> None:
        """Send the rows so far that W&B lacks; log a warning about those that the file has lost."""
        first = self._history.metrics_rows + 1
        rows = self.metrics.rows_after(first - 1)
        if lost := max(0, self.metrics.row_count - first + 1) - len(rows):
            log.warning("W&B lacks %d of rows %d to %d: %s lost them", lost, first, self.metrics.row_count, self.metrics.path)
        for row in rows:
            values = {name: float(row[name]) for name in row if row[name] != "" and name not in (METRICS_ROW, "step")}
            self._history.log_metrics_row(int(row[METRICS_ROW]), int(row["step"]), values)


def run_logger(trainer: Trainer) -> RunLogger | None:
    """The logger of the run, if ``trainer`` has one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)


def _disabled_run() -> Any:
    """Start a W&B run that ignores all calls, those of ``wandb.log`` too."""
    import wandb

    return wandb.init(mode="disabled")


def wandb_mode(options: WandbOptions, env: Mapping[str, str]) -> str:
    """``online``, ``offline`` or ``disabled``.

    ``auto`` follows WANDB_MODE if set; else it is online with an API key, in WANDB_API_KEY or in the netrc file, where
    ``wandb login`` writes it.
    """
    if options.mode != "auto":
        return options.mode
    if env.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return env["WANDB_MODE"]
    return "online" if wandb_api_key(env) else "offline"


def start_run_logger(
    run: Run,
    options: WandbOptions,
    config: Mapping[str, Any],
    world: World,
    step: Callable[[], int],
    ownership: Ownership,
    shown: Mapping[str, Any] | None = None,
) -> RunLogger:
    """Create the logger of a run, and start W&B on rank zero unless it is disabled.

    W&B shows the complete config, the git commit, the world and the Slurm job. ``step`` is that of ``RunLogger``. W&B shows
    the config ``shown``, if there is one, until ``show_config`` replaces it.
    """
    mode = wandb_mode(options, os.environ)
    metrics = CsvMetricsLogger(run.metrics, step, ownership.check_now, world.is_rank_zero)
    board = None
    if world.is_rank_zero and config.get("tensorboard"):
        board = TensorBoardWriter(run.tensorboard, run.metrics, ownership.attempt, ownership.check_now)
    if mode == "disabled" or not world.is_rank_zero:
        if world.is_rank_zero and "wandb" in sys.modules:
            _disabled_run()  # so that wandb.log in user code does nothing
        return RunLogger(metrics, None, step, options.project, ownership.check, board)
    if mode == "online" and wandb_api_key(os.environ) is None:
        mode = "offline"  # W&B would ask for the key
        log.warning("W&B has no API key on this machine, so the run is offline; %s", WANDB_KEY_ADVICE)
    launch = LaunchRecord.read(run.launch)
    facts = {
        "launch": launch.as_dict() if launch is not None else {},
        "world_size": world.size,
        "nodes": world.nodes,
        "launcher": world.launcher,
        "slurm": {name: os.environ[name] for name in _SLURM_VARIABLES if name in os.environ},
        "versions": {"lockstep": __version__} | {name: version(name) for name in ("torch", "torchvision", "lightning")},
    }
    client = WandbClient(run, options, {**(shown or config), "lockstep": facts}, mode == "online")
    return RunLogger(metrics, client, step, options.project, ownership.check, board)
