"""The W&B logger: one W&B run over all restarts, each row of metrics once, and no W&B error ends or slows training."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lockstep.config import WandbOptions
from lockstep.core import World, wandb_api_key
from lockstep.monitoring.csv_logger import read_metrics
from lockstep.monitoring.wandb_client import WandbClient, is_reachable, one_line
from lockstep.runs import LaunchRecord, Run

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

_SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_CLUSTER_NAME")

_PREEMPTED_SECONDS = 5.0
"""How long a preempted attempt waits for uploads; the next attempt sends the rest."""

_CLOSE_ATTEMPTS = 3
"""How often ``close`` tries to finish the W&B run, whose service may be killed meanwhile."""


class WandbRunLogger(WandbLogger):
    """Sends each row of ``metrics.csv`` to W&B once, under the row's number.

    If W&B fails, training continues, and ``close`` sends the missing rows from the file.

    Args:
        step: Returns the number of optimizer steps done.
        check_owner: Called before each row; raises Superseded where this attempt must not write any more.

    Attributes:
        row_count: Number of rows logged so far in the run.
        run: The W&B run; None if it could not be started.
    """

    run: "wandb.Run | None" = None

    def __init__(self, client: WandbClient, step: Callable[[], int], check_owner: Callable[[], None] = lambda: None) -> None:
        self._client, self._step, self._check_owner = client, step, check_owner
        self.row_count = self._sent_rows = 0
        self._has_failed = self._is_complete = False
        try:
            self._start()
        except Exception as error:  # W&B must not end a run
            self._has_failed = True
            log.warning("W&B cannot be started (%s); training continues, and all metrics are sent at the end", one_line(error))
        super().__init__(experiment=self.run)

    @property
    def experiment(self) -> "wandb.Run":
        """The W&B run, for callbacks that log to W&B directly."""
        if self.run is None:  # Lightning calls hasattr
            raise AttributeError("W&B could not be started")
        return self.run

    @property
    def url(self) -> str:
        """URL of the W&B run; empty if it is offline or could not be started."""
        return "" if self.run is None or self.run.offline else str(self.run.url)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send one row, unless W&B has it."""
        self.row_count += 1
        if not self._has_failed and self.row_count > self._sent_rows:
            self._send(self.row_count, self._step(), metrics)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: the W&B run starts with the complete config."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Do nothing: a test may follow the fit; ``close`` finishes the W&B run."""

    def close(self, exit_code: int, preempted: bool = False) -> bool:
        """Send missing rows, finish the W&B run, and return whether W&B has all of it.

        Args:
            exit_code: Exit code of the run, for W&B.
            preempted: Mark the run as preempting, and do not wait for a slow server.
        """
        closing = threading.Thread(target=self._close, args=(exit_code, preempted), name="wandb", daemon=True)
        closing.start()
        closing.join(_PREEMPTED_SECONDS if preempted else None)
        return self._is_complete

    def _close(self, exit_code: int, preempted: bool) -> None:
        for attempt in range(1, _CLOSE_ATTEMPTS + 1):
            try:
                self._finish(exit_code, preempted)
                self._is_complete = True
                return
            except Exception as error:  # W&B must not end a run, and the rows are in the file
                self._has_failed = True
                # A ConnectionError means that W&B's service has died; it can be started again.
                if attempt == _CLOSE_ATTEMPTS or not isinstance(error, ConnectionError):
                    command = f"lockstep sync {self._client.run.folder}"
                    log.warning("W&B does not have all metrics (%s); send the rest with: %s", one_line(error), command)
                    return

    def _finish(self, exit_code: int, preempted: bool) -> None:
        run = self.run
        is_offline = run is not None and run.offline and self._client.online and not preempted
        is_back = is_offline and run is not None and is_reachable(run.settings.base_url)
        if run is not None and is_back and not self._has_failed:
            run.finish()
        if is_back or self._has_failed:
            run = self._start()
        assert run is not None
        if preempted:
            run.mark_preempting()
        run.finish(exit_code=exit_code)
        # W&B's service does not report rows that a full disk has lost, and does not write more when there is space again.
        if run.offline and not preempted and (found := self._client.rows_on_disk()) < self._sent_rows:
            raise ConnectionError(f"its files have {found} of {self._sent_rows} rows")

    def _start(self) -> "wandb.Run":
        """Start the W&B run and send it the rows that it does not have."""
        self.run, self._sent_rows = self._client.start()
        self._has_failed = False
        rows = read_metrics(self._client.run.metrics)
        for number, row in enumerate(rows[self._sent_rows :], start=self._sent_rows + 1):
            self._send(number, int(row["step"]), {name: float(row[name]) for name in row if row[name] and name != "step"})
            if self._has_failed:
                break
        return self.run

    def _send(self, number: int, step: int, values: Mapping[str, float]) -> None:
        assert self.run is not None
        self._check_owner()
        try:
            self.run.log({**values, "trainer/global_step": step}, step=number)
            self._sent_rows = number
        except Exception as error:  # W&B must not end a run
            self._has_failed = True
            log.warning("W&B failed (%s); training continues, and the missing metrics are sent at the end", one_line(error))


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


def start_wandb_logger(
    run: Run,
    options: WandbOptions,
    config: Mapping[str, Any],
    world: World,
    step: Callable[[], int],
    check_owner: Callable[[], None],
) -> WandbRunLogger | None:
    """Start W&B on rank zero; return None on other ranks and if W&B is disabled.

    W&B shows the complete config, the git commit, the world and the Slurm job. ``step`` and ``check_owner`` are those of
    ``WandbRunLogger``.
    """
    mode = wandb_mode(options, os.environ)
    if mode == "disabled" or not world.is_rank_zero:
        return None
    launch = LaunchRecord.read(run.launch)
    facts = {
        "launch": launch.as_dict() if launch is not None else {},
        "world_size": world.size,
        "nodes": world.nodes,
        "launcher": world.launcher,
        "slurm": {name: os.environ[name] for name in _SLURM_VARIABLES if name in os.environ},
        "versions": {name: version(name) for name in ("lockstep", "torch", "torchvision", "lightning")},
    }
    return WandbRunLogger(WandbClient(run, options, {**config, "lockstep": facts}, mode == "online"), step, check_owner)
