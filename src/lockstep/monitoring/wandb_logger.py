"""W&B, on rank zero alone: one run however often it restarts, each row once, and nothing that it does ends or slows a run."""

import contextlib
import http.client
import json
import logging
import os
import signal
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lockstep.config import WandbOptions
from lockstep.core import World, wandb_api_key
from lockstep.distributed import STOP_SIGNALS
from lockstep.monitoring.csv_logger import read_metrics
from lockstep.runs import Run

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


_SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_CLUSTER_NAME")


_FINISH_SECONDS = 60.0
"""How long the end of a run waits for W&B to take everything; what it does not is on disk."""


_PREEMPTED_FINISH_SECONDS = 5.0
"""The same where the nodes are wanted back: the next attempt sends the rest."""


_FINISH_ATTEMPTS = 3
"""How often the end of a run tries to close W&B, whose service may be killed meanwhile."""


_CONNECT_SECONDS = 5.0
"""How long W&B's server is waited for before a run goes on without it."""


class WandbRunLogger(WandbLogger):
    """W&B's run, which gets each row of ``metrics.csv`` once, under the row's number.

    W&B is helped after it was away: what it has not got is in the file. Its service may die; training does not.

    Args:
        start: Makes W&B's run, again if need be.
        online: Whether the run is to be online, where the server can be reached.
        path: ``metrics.csv``.
        step: Number of optimizer steps done.
        on_disk: How many rows W&B's offline files hold.

    Attributes:
        rows: How many rows were logged, up to here in the run.
        run: W&B's run; None where W&B could not be started.
    """

    run: "wandb.Run | None" = None

    def __init__(
        self,
        start: Callable[[], tuple["wandb.Run", int]],
        online: bool,
        path: Path,
        step: Callable[[], int],
        on_disk: Callable[[], int],
    ) -> None:
        self._start, self._online, self._path, self._step, self._on_disk = start, online, path, step, on_disk
        self.row_count = self._has = 0
        self._is_down = self._is_complete = False
        try:
            self._begin()
        except Exception as error:  # nothing that a tracker does ends a run
            self._is_down = True
            log.warning("W&B cannot be started (%s); training goes on, and W&B gets all at the end", _one_line(error))
        super().__init__(experiment=self.run)

    @property
    def experiment(self) -> "wandb.Run":
        """W&B's run, for a callback of one's own that knows W&B."""
        if self.run is None:  # lightning asks whether there is one
            raise AttributeError("W&B could not be started")
        return self.run

    @property
    def url(self) -> str:
        """Where W&B has the run; empty where it has nothing, or not online."""
        return "" if self.run is None or self.run.offline else str(self.run.url)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send one row, if W&B has not got it."""
        self.row_count += 1
        if not self._is_down and self.row_count > self._has:
            self._send(self.row_count, self._step(), metrics)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """W&B has the whole config from the start."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Nothing: a run is more than a fit."""

    def close(self, exit_code: int, preempted: bool = False) -> bool:
        """Send what is missing, finish the run, and say whether W&B has all of it.

        Where the nodes are wanted back, a slow server is not waited for.
        """
        closing = threading.Thread(target=self._close, args=(exit_code, preempted), name="wandb", daemon=True)
        closing.start()
        closing.join(_PREEMPTED_FINISH_SECONDS if preempted else None)
        return self._is_complete

    def _close(self, exit_code: int, preempted: bool) -> None:
        for left in range(_FINISH_ATTEMPTS, 0, -1):
            try:
                self._finish(exit_code, preempted)
                self._is_complete = True
                return
            except Exception as error:  # whatever a tracker may raise: the run is over, and its rows are in the file
                self._is_down = True
                if left == 1 or not isinstance(error, ConnectionError):  # else its service has died, and may start again
                    command = f"lockstep sync {self._path.parent}"
                    log.warning("W&B has not got everything (%s); to give it the rest: %s", _one_line(error), command)
                    return

    def _finish(self, exit_code: int, preempted: bool) -> None:
        run = self.run
        is_back = run is not None and run.offline and self._online and not preempted and is_reachable(run.settings.base_url)
        if run is not None and is_back and not self._is_down:
            run.finish()
        if is_back or self._is_down:
            run = self._begin()
        assert run is not None
        if preempted:
            run.mark_preempting()
        run.finish(exit_code=exit_code)
        # Its service does not say that a full disk has eaten rows, and writes no more where there is room again.
        if run.offline and not preempted and (there := self._on_disk()) < self._has:
            raise ConnectionError(f"its files have {there} of {self._has} rows")

    def _begin(self) -> "wandb.Run":
        """Start W&B's run, and send it what it has not got."""
        self.run, self._has = self._start()
        self._is_down = False
        self._catch_up()
        return self.run

    def _catch_up(self) -> None:
        """Send the rows that are in the file and not with W&B."""
        rows = read_metrics(self._path) if self._path.exists() else []
        for number, row in enumerate(rows[self._has :], start=self._has + 1):
            values = {name: float(value) for name, value in row.items() if value and name != "step"}
            self._send(number, int(row["step"]), values)
            if self._is_down:
                break

    def _send(self, number: int, step: int, values: Mapping[str, float]) -> None:
        assert self.run is not None
        try:
            self.run.log({**values, "trainer/global_step": step}, step=number)
            self._has = number
        except Exception as error:  # as above: nothing that a tracker does ends a run
            self._is_down = True
            log.warning("W&B is gone (%s); training goes on, and W&B gets the rest at the end", _one_line(error))


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def wandb_mode(options: WandbOptions, env: Mapping[str, str]) -> str:
    """``online``, ``offline`` or ``disabled``.

    ``auto`` follows WANDB_MODE, else is online where an API key is configured (WANDB_API_KEY, or ``wandb login``'s entry in
    the netrc file).
    """
    if options.mode != "auto":
        return options.mode
    if env.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return env["WANDB_MODE"]
    return "online" if wandb_api_key(env) else "offline"


def start_wandb_logger(
    run: Run, options: WandbOptions, config: Mapping[str, Any], world: World, step: Callable[[], int]
) -> WandbRunLogger | None:
    """W&B's run on rank zero, under the run's own id; None on other ranks and where W&B is off.

    W&B learns the complete config, the git commit, the world and what Slurm says of the job.
    """
    mode = wandb_mode(options, os.environ)
    if mode == "disabled" or not world.is_rank_zero:
        return None
    facts = {
        "launch": yaml.safe_load(run.launch.read_text()) if run.launch.exists() else {},
        "world_size": world.size,
        "nodes": world.nodes,
        "launcher": world.launcher,
        "slurm": {name: os.environ[name] for name in _SLURM_VARIABLES if name in os.environ},
        "versions": {name: version(name) for name in ("lockstep", "torch", "torchvision", "lightning")},
    }
    return make_wandb_logger(run, options, {**config, "lockstep": facts}, mode == "online", step)


def make_wandb_logger(
    run: Run, options: WandbOptions, config: Mapping[str, Any], online: bool, step: Callable[[], int]
) -> WandbRunLogger:
    """W&B's run, with all rows of metrics so far."""
    return WandbRunLogger(
        lambda: _start_wandb(run, options, config, online), online, run.metrics, step, lambda: _rows_on_disk(run)
    )


def is_reachable(address: str) -> bool:
    """Whether W&B's server answers, whatever it says: to be asked before W&B, which tries for a minute and a half."""
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=_CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # W&B's client has its own certificates
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def _start_wandb(run: Run, options: WandbOptions, config: Mapping[str, Any], online: bool) -> tuple["wandb.Run", int]:
    """W&B's run, and how many rows of metrics it has."""
    import wandb  # a second and a half that only rank zero pays

    arguments: dict[str, Any] = {
        "id": run.id,
        "resume": "allow",
        "name": f"{run.name}-{run.id}",
        "dir": run.folder,
        "project": options.project,
        "entity": options.entity,
        "group": options.group,
        "tags": options.tags or None,
        "notes": options.notes,
        "config": dict(config),
        # Its greetings are silenced; what matters of them is logged here.
        "settings": wandb.Settings(silent=True, finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True),
    }
    # A signal to the whole job must not take W&B's service down: it inherits this.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        try:
            tracked = _init(online, arguments)
        except ConnectionError:  # the service of before is dead
            _teardown_service()
            tracked = _init(online, arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    has = _rows_on_disk(run) if tracked.offline else max(0, tracked.step - 1) if tracked.resumed else 0
    # As lightning's logger does for a run that it starts itself: optimizer steps are the x axis.
    tracked.define_metric("trainer/global_step")
    tracked.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    if tracked.offline:
        log.info("W&B is offline; to upload the run: %s", sync_command(run))
    else:
        log.info("W&B: %s", tracked.url)
    return tracked, has


def _init(online: bool, arguments: Mapping[str, Any]) -> "wandb.Run":
    """W&B's run; offline too if its server cannot be reached: a training job does not die of its tracker."""
    import wandb

    if online and not is_reachable(wandb.setup().settings.base_url):
        log.warning("W&B cannot be reached, going on offline; it is tried again at the end")
        online = False
    try:
        return wandb.init(mode="online" if online else "offline", **arguments)
    except wandb.Error as error:
        log.warning("W&B does not take the run, going on offline: %s", _one_line(error))
        _teardown_service()
        return wandb.init(mode="offline", **arguments)


def _teardown_service() -> None:
    """Forget W&B's service, which still holds the run's id, or is dead."""
    import wandb

    with contextlib.suppress(ConnectionError):
        wandb.teardown()


def _rows_on_disk(run: Run) -> int:
    """The highest row number in what earlier attempts have left for W&B on this disk."""
    from wandb.util import get_core_path

    rows = 0
    for file in run.folder.glob("wandb/*run-*/run-*.wandb"):
        # `wandb leet inspect`, but for a second and a half to start Python.
        command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=_FINISH_SECONDS).stdout
        for line in said.splitlines():
            if '"history"' in line and (record := json.loads(line)).get("type") == "history":
                rows = max(rows, int(record["history"]["item"]["_step"]))
    return rows


def sync_command(run: Run) -> str:
    """What uploads an offline run; one that W&B has in part, without sending that again."""
    in_part = any(run.folder.glob("wandb/run-*"))
    return f"lockstep sync {run.folder}" if in_part else f"wandb sync {run.folder}/wandb/offline-run-*"
