"""A run on this machine: in this very process, or as several ranks."""

import logging
import sys
from collections.abc import Sequence

from lockstep.config import parse
from lockstep.logs import start_logging
from lockstep.ranks import RankFailed, fork_ranks
from lockstep.run import Run, update_status, write_whole
from lockstep.train import split_command, train
from lockstep.world import World

log = logging.getLogger(__name__)


def train_locally(arguments: Sequence[str], nodes: int, ranks: int, typed: Sequence[str]) -> int:
    """Train with ``nodes`` × ``ranks`` ranks and return the exit status.

    Args:
        arguments: What the trainer is told: a command and the keys of the config.
        nodes: Pretend nodes.
        ranks: Ranks on each.
        typed: The whole command line, for the record.

    Raises:
        LockstepError: With one rank, what the trainer says; so does any other exception, with its own traceback.
    """
    command, keys = split_command(arguments)
    parser, config = parse(keys)
    run, attempt = Run.start(config.run.root, config.run.name, typed, nodes, ranks)
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
    except RankFailed as failure:
        if not run.result.exists():  # rank zero had no time to write it
            reason = f"rank {failure.world.rank}: {failure.report.strip().splitlines()[-1]}"
            write_whole(run.result, {"status": "failed", "reason": reason, "world_size": nodes * ranks, "attempts": attempt})
            update_status(run, "failed")
        start_logging(World())
        if failure.sentence:
            print(f"lockstep: {failure.report}", file=sys.stderr)
        else:
            place = f"rank {failure.world.rank} of {failure.world.size} (node {failure.world.node_rank})"
            log.error(
                "%s failed first; the others were ended.\n%s\nlogs: %s",
                place,
                failure.report.rstrip(),
                run.log(attempt, 0).parent,
            )
        return failure.exit_status
    except KeyboardInterrupt:
        print(f"interrupted; all ranks were ended. run folder {run.folder}", file=sys.stderr)
        return 130
    return 0
