"""Run on this machine: in this process, or as several ranks."""

import logging
import os
import sys
from collections.abc import Sequence

from lockstep.config import split_command
from lockstep.core import Interrupted, LockstepError, World, clear_line, setup_logging, shell_command
from lockstep.distributed import PhaseBoard, RankFailed, fork_ranks, phase_limits
from lockstep.runs import Owner, Run, record_earlier_attempts, record_failure, write_failed_result
from lockstep.slurm import is_owner_alive
from lockstep.trainer.config_parser import parse_config
from lockstep.trainer.preload import copy_shards, preload
from lockstep.trainer.session import train

log = logging.getLogger(__name__)


def run_locally(
    keys: Sequence[str], nodes: int, ranks: int, program: Sequence[str], typed: Sequence[str], resume: Run | None
) -> int:
    """Train with ``nodes`` × ``ranks`` ranks and return the exit status.

    Args:
        keys: A command and the keys of the config.
        nodes: Simulated nodes.
        ranks: Ranks on each.
        program: The command that was typed, and ``typed`` its arguments.
        resume: The run to resume, whose config is among ``keys``; None starts a new one.

    Raises:
        LockstepError: With one rank, any error of the trainer. Other exceptions, except signals, propagate too.
    """
    command, keys = split_command(keys)
    parsed = parse_config(keys, command)
    if resume is None:
        run, attempt = Run.start(parsed[1].run.root, parsed[1].run.name, [*program, *typed], nodes, ranks)
    else:
        run = resume
        attempt = run.claim_attempt(Owner.this_process(), lambda owner: is_owner_alive(owner, os.environ))
        record_earlier_attempts(run, attempt)
    to_resume = f"to resume: {shell_command('local', '--resume', run.folder)}"
    try:
        copy_shards(command, parsed[1], World())
        if nodes * ranks == 1:
            try:
                train(command, parsed, World(), run, attempt)
            except LockstepError:
                raise
            except Exception as error:
                error.add_note(f"logs: {run.attempt_folder(attempt)}\n{to_resume}")  # the traceback ends with it
                raise
            return 0
        preload(parsed[1])
        board = PhaseBoard(nodes * ranks, phase_limits(parsed[1].run.hang_timeout_seconds))

        def train_rank(world: World) -> None:
            train(command, parsed, world, run, attempt, board.reporter(world.rank))

        fork_ranks(
            train_rank, nodes, ranks, lambda world: run.log(attempt, world.rank, world.node_rank) if world.rank else None, board
        )
    except RankFailed as failed:
        clear_line(sys.stderr)  # a killed rank leaves its progress line there
        result, failure = run.result_of(attempt), failed.failure
        if result is None or result.status != "interrupted":
            # The watchdog of a rank may have recorded first that another one hangs.
            failure = record_failure(run, attempt, failure)
        # Rank zero was killed before it wrote its result, or has only lost a peer.
        if failure.in_final_test or result is None or (failure.is_cause and not result.is_finished):
            write_failed_result(run, attempt, failure)
        setup_logging(World())
        if failure.is_interruption:
            print(f"interrupted; {to_resume}", file=sys.stderr)
        elif failure.is_permanent:
            print(f"lockstep: {failure.report}", file=sys.stderr)
        else:
            who = f"rank {failure.rank} of {failure.world_size} {failure.place}"
            report, logs = failure.report.rstrip(), run.attempt_folder(attempt)
            log.error("%s failed first; the other ranks were ended.\n%s\nlogs: %s\n%s", who, report, logs, to_resume)
        result = run.result_of(attempt)
        return 0 if result is not None and result.is_finished else failure.exit_status
    except (KeyboardInterrupt, Interrupted) as interrupted:
        clear_line(sys.stderr)  # with the ^C of the terminal
        print(f"interrupted; {to_resume}" if run.config.exists() else "interrupted before the start", file=sys.stderr)
        return int(interrupted.code or 1) if isinstance(interrupted, Interrupted) else 130
    return 0
