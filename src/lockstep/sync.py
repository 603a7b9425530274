"""Give W&B what it has missed of a run: ``python -m lockstep.sync RUN``.

Each row of ``metrics.csv`` that W&B has not got is sent under its number, so that nothing is there twice, whatever became of
the attempts that sent the others.
"""

import sys
from collections.abc import Sequence
from os import environ
from pathlib import Path

import wandb
import yaml

from lockstep.disk import read_whole
from lockstep.errors import LockstepError, RunError, UsageError
from lockstep.logs import start_logging
from lockstep.options import WandbOptions
from lockstep.run import Run
from lockstep.squeue import holds
from lockstep.tracking import is_reachable, track
from lockstep.wandb_key import wandb_key
from lockstep.world import World


def sync(run: Run) -> str:
    """Send all of ``run`` that W&B has not got, and return the address of its page.

    Raises:
        UsageError: The run is being trained.
        RunError: W&B cannot be reached, or does not take it.
    """
    if (owner := read_whole(run.folder / "owner.json")) and holds(owner, environ):
        raise UsageError(f"The run {run.folder} is being trained, and sends what it has missed by itself.")
    if wandb_key(environ) is None:
        raise UsageError("W&B has no key here; set WANDB_API_KEY, or use wandb login.")
    if not is_reachable(address := wandb.setup().settings.base_url):
        raise RunError(f"W&B cannot be reached at {address}; try again later.")
    config = yaml.safe_load(run.config.read_text())
    tracked = track(run, WandbOptions(**config["wandb"]), config, True, lambda: 0)
    is_finished = read_whole(run.result).get("status") == "finished"
    place = tracked.place
    if not tracked.close(0 if is_finished else 1) or not place:
        raise RunError("W&B has not taken all of it; try again later.")
    return place


def main(arguments: Sequence[str]) -> int:
    """Sync the run folder that is named, and return the exit status."""
    start_logging(World())
    try:
        if len(arguments) != 1:
            raise UsageError("write one run folder: python -m lockstep.sync runs/digits/<id>")
        print(sync(Run.existing(Path(arguments[0]))))
        return 0
    except LockstepError as error:
        print(f"lockstep: {error.sentence}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
