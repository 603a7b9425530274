"""``lockstep sync RUN``: send W&B the rows of ``metrics.csv`` that it lacks.

Each row is sent with its number, so that W&B has no row twice.
"""

from collections.abc import Sequence
from contextlib import closing
from os import environ
from pathlib import Path

import wandb
import yaml

from lockstep.config import WandbOptions
from lockstep.core import CommandLineParser, RunError, UsageError, World, setup_logging, wandb_api_key
from lockstep.monitoring.csv_logger import CsvMetricsLogger
from lockstep.monitoring.wandb_client import WandbClient, is_reachable, one_line
from lockstep.monitoring.wandb_logger import RunLogger
from lockstep.runs import Run, RunResult
from lockstep.slurm import is_owner_alive


def sync_run(run: Run) -> str:
    """Send all missing rows of ``run`` and return the URL of its W&B run.

    Raises:
        UsageError: The run is being trained, its config is damaged, or W&B has no API key.
        RunError: W&B cannot be reached or does not accept the rows.
    """
    if run.living_owner(lambda owner: is_owner_alive(owner, environ)) is not None:
        raise UsageError(f"The run {run.folder} is being trained and sends missing rows itself; run sync after it has ended.")
    try:
        config = yaml.safe_load(run.config.read_text())
        options = WandbOptions(**config["wandb"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"{run.config} is damaged ({one_line(error)}); restore it, and run sync again.") from None
    if wandb_api_key(environ) is None:
        raise UsageError("W&B has no API key on this machine; set WANDB_API_KEY or run wandb login.")
    if not is_reachable(address := wandb.setup().settings.base_url):
        raise RunError(f"W&B cannot be reached at {address}; try again later.")
    with closing(CsvMetricsLogger(run.metrics, step=lambda: 0)) as metrics:
        metrics.row_count = metrics.newest_row
        logger = RunLogger(metrics, WandbClient(run, options, config, online=True), lambda: 0, options.project)
        url = logger.url
        result = RunResult.read(run.result)
        if not logger.close(0 if result is not None and result.is_finished else 1) or not url:
            raise RunError("W&B does not have all rows; try again later.")
    return url


def main(arguments: Sequence[str]) -> int:
    """Run ``lockstep sync RUN`` and return its exit status."""
    parser = CommandLineParser(prog="lockstep sync", description="Send W&B the rows of a run that it does not have.")
    parser.add_argument("run", type=Path, metavar="RUN", help="Run folder, such as runs/digits/<id>.")
    run = Run.open(parser.parse_args(arguments).run)
    setup_logging(World())
    print(sync_run(run))
    return 0
