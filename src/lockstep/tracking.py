"""Where metrics go: ``metrics.csv`` always, and W&B on rank zero alone."""

import csv
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lockstep.options import WandbOptions
from lockstep.run import Run
from lockstep.wandb_key import wandb_key
from lockstep.world import World

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

_SLURM = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_CLUSTER_NAME")


class MetricsFile(Logger):
    """Appends one row per logged step to ``metrics.csv``: step, epoch, then the metrics in the order of their appearance.

    Unlike lightning's CSVLogger it goes on with the file that it finds: a restarted run keeps its history.

    Args:
        path: The file.

    Attributes:
        newest: The newest value of every metric.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.newest: dict[str, float] = {}
        self._columns: list[str] = []
        if path.exists():
            with path.open(newline="") as file:
                self._columns = next(csv.reader(file), [])

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
        row = {"step": step, "epoch": metrics.get("epoch", "")} | dict(metrics)
        if added := [name for name in row if name not in self._columns]:
            rows = self._rows()
            self._columns += added
            beside = self.path.with_name(f".{self.path.name}")
            with beside.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)
            beside.replace(self.path)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rows(self) -> list[dict[str, str]]:
        return read_metrics(self.path) if self.path.exists() else []


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


def start_wandb(run: Run, options: WandbOptions, config: Mapping[str, Any], world: World) -> "wandb.Run | None":
    """W&B's run on rank zero, under the run's own id; None on other ranks and where W&B is off.

    W&B learns the complete config, the git commit, the world and what Slurm says of the job.
    """
    mode = wandb_mode(options, os.environ)
    if mode == "disabled" or not world.is_zero:
        return None
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
        "settings": wandb.Settings(silent=True),
    }
    try:
        tracked = wandb.init(mode="offline" if mode == "offline" else "online", **arguments)
    except wandb.Error as error:
        # A training job does not die of its tracker.
        log.warning("W&B cannot be reached, going on offline: %s", " ".join(str(error).split()))
        wandb.teardown()  # its service still holds the id
        mode, tracked = "offline", wandb.init(mode="offline", **arguments)
    # As lightning's logger does for a run that it starts itself: optimizer steps are the x axis.
    tracked.define_metric("trainer/global_step")
    tracked.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    if mode == "offline":
        log.info("W&B is offline; to upload the run: %s", sync_command(run))
    else:
        log.info("W&B: %s", tracked.url)
    return tracked


def sync_command(run: Run) -> str:
    """What uploads an offline run."""
    return f"wandb sync {run.folder}/wandb/offline-run-*"
