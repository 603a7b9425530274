"""A run on this machine: in this very process, or as several ranks."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from lockstep.core import Interrupted, World, atomic_write_json, setup_logging
from lockstep.distributed import RankFailed, fork_ranks
from lockstep.runs import Run, read_first_failure, update_status
from lockstep.slurm import is_owner_alive
from lockstep.trainer.config_parser import parse_config, split_command
from lockstep.trainer.session import train

log = logging.getLogger(__name__)


def run_locally(
    arguments: Sequence[str], nodes: int | None, ranks: int | None, typed: Sequence[str], resume: Run | None = None
) -> int:
    """Train with ``nodes`` × ``ranks`` ranks and return the exit status.

    Args:
        arguments: What the trainer is told: a command and the keys of the config.
        nodes: Pretend nodes; None is one, or as many as the run had.
        ranks: Ranks on each; the same.
        typed: The whole command line, for the record.
        resume: A run to go on with, whose config is among ``arguments``; None begins a new one.

    Raises:
        LockstepError: With one rank, what the trainer says; so does any other exception, with its own traceback.
    """
    command, keys = split_command(arguments)
    before: dict[str, Any] = {}
    if resume is not None:
        run = resume
        before = yaml.safe_load(run.launch.read_text())
    nodes, ranks = nodes or int(str(before.get("nodes", 1)).rpartition("-")[2]), ranks or before.get("ranks_per_node", 1)
    parser, config = parse_config(keys)
    if resume is None:
        run, attempt = Run.start(config.run.root, config.run.name, typed, nodes, ranks)
    else:
        attempt = run.begin_attempt(None, lambda owner: is_owner_alive(owner, os.environ))
    if nodes * ranks == 1:
        train(command, parser, config, World(), run, attempt)
        return 0
    try:
        fork_ranks(
            lambda world: train(command, parser, config, world, run, attempt) and None,
            nodes,
            ranks,
            logs=lambda rank: run.log(attempt, rank),
        )
    except RankFailed as failed:
        failure = failed
        if stuck := read_first_failure(run, attempt):  # written by a rank that has seen another one hang
            its_place = World(stuck.rank, nodes * ranks, stuck.rank % ranks, ranks)
            failure = RankFailed(its_place, stuck.report, stuck.exit_status, is_sentence=True)
        if not run.result.exists():  # rank zero had no time to write it
            reason = f"rank {failure.world.rank}: {failure.report.strip().splitlines()[-1]}"
            atomic_write_json(
                run.result, {"status": "failed", "reason": reason, "world_size": nodes * ranks, "attempts": attempt}
            )
            update_status(run, "failed")
        setup_logging(World())
        if failure.is_sentence:
            print(f"lockstep: {failure.report}", file=sys.stderr)
        else:
            place = f"rank {failure.world.rank} of {failure.world.size} (node {failure.world.node_rank})"
            log.error(
                "%s failed first; the others were ended.\n%s\nlogs: %s\nto go on: launch/local.py --resume %s",
                place,
                failure.report.rstrip(),
                run.log(attempt, 0).parent,
                run.folder,
            )
        return failure.exit_status
    except (KeyboardInterrupt, Interrupted) as interrupted:
        print(f"interrupted; to go on: launch/local.py --resume {run.folder}", file=sys.stderr)
        return int(interrupted.code or 1) if isinstance(interrupted, Interrupted) else 130
    return 0
