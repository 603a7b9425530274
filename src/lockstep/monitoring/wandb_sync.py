"""Give W&B what it has missed of a run: ``lockstep sync RUN``.

Each row of ``metrics.csv`` that W&B has not got is sent under its number, so that nothing is there twice, whatever became of
the attempts that sent the others.
"""

import sys
from collections.abc import Sequence
from os import environ
from pathlib import Path

import wandb
import yaml

from lockstep.config import WandbOptions
from lockstep.core import LockstepError, RunError, UsageError, World, setup_logging, wandb_api_key
from lockstep.monitoring.wandb_logger import is_reachable, make_wandb_logger
from lockstep.runs import Owner, Run, RunResult
from lockstep.slurm import is_owner_alive


def sync_run(run: Run) -> str:
    """Send all of ``run`` that W&B has not got, and return the address of its page.

    Raises:
        UsageError: The run is being trained.
        RunError: W&B cannot be reached, or does not take it.
    """
    if (owner := Owner.read(run.owner)) and is_owner_alive(owner, environ):
        raise UsageError(f"The run {run.folder} is being trained, and sends what it has missed by itself.")
    if wandb_api_key(environ) is None:
        raise UsageError("W&B has no key here; set WANDB_API_KEY, or use wandb login.")
    if not is_reachable(address := wandb.setup().settings.base_url):
        raise RunError(f"W&B cannot be reached at {address}; try again later.")
    config = yaml.safe_load(run.config.read_text())
    tracked = make_wandb_logger(run, WandbOptions(**config["wandb"]), config, True, lambda: 0)
    result = RunResult.read(run.result)
    is_finished = result is not None and result.is_finished
    place = tracked.url
    if not tracked.close(0 if is_finished else 1) or not place:
        raise RunError("W&B has not taken all of it; try again later.")
    return place


def main(arguments: Sequence[str]) -> int:
    """Sync the run folder that is named, and return the exit status."""
    setup_logging(World())
    try:
        if len(arguments) != 1:
            raise UsageError("write one run folder: lockstep sync runs/digits/<id>")
        print(sync_run(Run.open(Path(arguments[0]))))
        return 0
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
