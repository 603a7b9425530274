"""Where metrics go: ``metrics.csv`` always, and W&B on rank zero alone."""

import contextlib
import csv
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lockstep.options import WandbOptions
from lockstep.run import Run
from lockstep.stop import STOPPING
from lockstep.wandb_key import wandb_key
from lockstep.world import World

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

_SLURM = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_CLUSTER_NAME")


_FINISH_SECONDS = 60.0
"""How long the end of a run waits for W&B to take everything; what it does not is on disk."""


class MetricsFile(Logger):
    """Appends one row per logged step to ``metrics.csv``: step, epoch, then the metrics in the order of their appearance.

    Rows are counted. A run that goes on from a checkpoint counts on from what was logged when that was saved, and a row that
    is in the file already is not written again: what is logged twice, because steps are done twice, is there once.

    Args:
        path: The file.
        step: Number of optimizer steps done; lightning's own label counts from 0.

    Attributes:
        rows: How many rows were logged, up to here in the run.
        newest: The newest value of every metric.
    """

    def __init__(self, path: Path, step: Callable[[], int]) -> None:
        super().__init__()
        self.path, self._step = path, step
        self.rows = 0
        self.newest: dict[str, float] = {}
        self._columns: list[str] = []
        self._written = 0
        self._waiting: list[dict[str, Any]] = []
        if path.exists():
            _drop_half_a_line(path)
            self._columns, self._written = _columns(path), len(read_metrics(path))

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name

    @property
    def version(self) -> str:
        """There is one file per run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The config is saved elsewhere, whole."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row; new metrics become new columns."""
        self.newest |= metrics
        self.rows += 1
        if self.rows <= self._written:
            return
        self._written = self.rows
        self._waiting.append({"step": self._step(), "epoch": metrics.get("epoch", "")} | dict(metrics))
        try:
            self._write()
        except OSError as error:
            log.warning("%s could not be written (%s); training goes on, and its rows wait", self.path, error.strerror)

    def _write(self) -> None:
        """Append what waits; all of it or nothing."""
        names = dict.fromkeys(name for row in self._waiting for name in row)
        if added := [name for name in names if name not in self._columns]:
            rows = read_metrics(self.path) if self.path.exists() else []
            beside = self.path.with_name(f".{self.path.name}")
            with beside.open("w", newline="") as file:
                writer = csv.DictWriter(file, [*self._columns, *added])
                writer.writeheader()
                writer.writerows(rows)
            beside.replace(self.path)
            self._columns += added
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerows(self._waiting)
        except OSError:
            os.truncate(self.path, size)
            raise
        self._waiting.clear()

    def save(self) -> None:
        """Write what waits and flush the file to disk: a checkpoint counts on its rows."""
        try:
            if self._waiting:
                self._write()
            if self.path.exists():
                with self.path.open("a") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            log.warning("%s could not be written (%s); training goes on, and its rows wait", self.path, error.strerror)


def _drop_half_a_line(path: Path) -> None:
    """Take off what a killed process has begun to write."""
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def _columns(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


class Tracked(WandbLogger):
    """W&B's run, which gets each row of ``metrics.csv`` once, under the row's number.

    W&B is helped after it was away: what it has not got is in the file. Its service may die; training does not.

    Args:
        start: Makes W&B's run, again if need be.
        path: ``metrics.csv``.
        step: Number of optimizer steps done.

    Attributes:
        rows: How many rows were logged, up to here in the run.
        run: W&B's run.
    """

    def __init__(self, start: Callable[[], tuple["wandb.Run", int]], path: Path, step: Callable[[], int]) -> None:
        self._start, self._path, self._step = start, path, step
        self.rows = 0
        self.run, self._has = start()
        self._is_down = False
        super().__init__(experiment=self.run)
        self._catch_up()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send one row, if W&B has not got it."""
        self.rows += 1
        if not self._is_down and self.rows > self._has:
            self._send(self.rows, self._step(), metrics)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """W&B has the whole config from the start."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Nothing: a run is more than a fit."""

    def close(self, exit_code: int, preempted: bool = False) -> None:
        """Send what is missing and finish the run."""
        try:
            if self._is_down:
                self.run, self._has = self._start()
                self._is_down = False
                self._catch_up()
            if preempted:
                self.run.mark_preempting()
            self.run.finish(exit_code=exit_code)
        except Exception as error:  # whatever a tracker may raise: the run is over, and its rows are in the file
            log.warning("W&B could not be closed (%s); %s has all that was logged", _one_line(error), self._path)

    def _catch_up(self) -> None:
        """Send the rows that are in the file and not with W&B."""
        rows = read_metrics(self._path) if self._path.exists() else []
        for number, row in enumerate(rows[self._has :], start=self._has + 1):
            values = {name: float(value) for name, value in row.items() if value and name != "step"}
            self._send(number, int(row["step"]), values)
            if self._is_down:
                break

    def _send(self, number: int, step: int, values: Mapping[str, float]) -> None:
        try:
            self.run.log({**values, "trainer/global_step": step}, step=number)
            self._has = number
        except Exception as error:  # as above: nothing that a tracker does ends a run
            self._is_down = True
            log.warning("W&B is gone (%s); training goes on, and W&B gets the rest at the end", _one_line(error))


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv``; a metric that a row does not have is an empty text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def wandb_mode(options: WandbOptions, env: Mapping[str, str]) -> str:
    """``online``, ``offline`` or ``disabled``.

    ``auto`` follows WANDB_MODE, else is online where an API key is configured (WANDB_API_KEY, or ``wandb login``'s entry in
    the netrc file).
    """
    if options.mode != "auto":
        return options.mode
    if env.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return env["WANDB_MODE"]
    return "online" if wandb_key(env) else "offline"


def start_tracking(
    run: Run, options: WandbOptions, config: Mapping[str, Any], world: World, step: Callable[[], int]
) -> Tracked | None:
    """W&B's run on rank zero, under the run's own id; None on other ranks and where W&B is off.

    W&B learns the complete config, the git commit, the world and what Slurm says of the job.
    """
    if wandb_mode(options, os.environ) == "disabled" or not world.is_zero:
        return None
    return Tracked(lambda: _start_wandb(run, options, config, world), run.metrics, step)


def _start_wandb(run: Run, options: WandbOptions, config: Mapping[str, Any], world: World) -> tuple["wandb.Run", int]:
    """W&B's run, and how many rows of metrics it has."""
    import wandb  # a second and a half that only rank zero pays

    launch = yaml.safe_load(run.launch.read_text()) if run.launch.exists() else {}
    facts = {
        "launch": launch,
        "world_size": world.size,
        "nodes": world.nodes,
        "launcher": world.launcher,
        "slurm": {name: os.environ[name] for name in _SLURM if name in os.environ},
        "versions": {name: version(name) for name in ("lockstep", "torch", "torchvision", "lightning")},
    }
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
        "config": {**config, "lockstep": facts},
        # Its greetings are silenced; what matters of them is logged here.
        "settings": wandb.Settings(silent=True, finish_timeout=_FINISH_SECONDS),
    }
    mode: Literal["online", "offline"] = "offline" if wandb_mode(options, os.environ) == "offline" else "online"
    # A signal to the whole job must not take W&B's service down: it inherits this.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        try:
            tracked = wandb.init(mode=mode, **arguments)
        except ConnectionError:  # the service of before is dead
            _let_go()
            tracked = wandb.init(mode=mode, **arguments)
    except wandb.Error as error:
        # A training job does not die of its tracker.
        log.warning("W&B cannot be reached, going on offline: %s", _one_line(error))
        _let_go()
        mode, tracked = "offline", wandb.init(mode="offline", **arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    has = _rows_on_disk(run) if mode == "offline" else tracked.step - 1 if tracked.resumed else 0
    # As lightning's logger does for a run that it starts itself: optimizer steps are the x axis.
    tracked.define_metric("trainer/global_step")
    tracked.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    if mode == "offline":
        log.info("W&B is offline; to upload the run: %s", sync_command(run))
    else:
        log.info("W&B: %s", tracked.url)
    return tracked, has


def _let_go() -> None:
    """Forget W&B's service, which still holds the run's id, or is dead."""
    import wandb

    with contextlib.suppress(ConnectionError):
        wandb.teardown()


def _rows_on_disk(run: Run) -> int:
    """The highest row number in what earlier attempts have left for W&B on this disk."""
    rows = 0
    for file in run.folder.glob("wandb/*run-*/run-*.wandb"):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        said = subprocess.run(command, capture_output=True, text=True).stdout
        for line in said.splitlines():
            if '"history"' in line and (record := json.loads(line)).get("type") == "history":
                rows = max(rows, int(record["history"]["item"]["_step"]))
    return rows


def sync_command(run: Run) -> str:
    """What uploads an offline run."""
    return f"wandb sync {run.folder}/wandb/offline-run-*"
