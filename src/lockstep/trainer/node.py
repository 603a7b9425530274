"""The agent of one node of a Slurm job: it imports and parses once, and trains with the ranks that it forks."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from lockstep.core import LockstepError, UsageError, World, setup_logging
from lockstep.distributed import Agent, Channel, Plan, job_key, phase_limits, share_cpus
from lockstep.runs import Failure, Run, record_failure, write_failed_result
from lockstep.slurm import NodeTask, restart_in_allocation
from lockstep.trainer.config_parser import parse_config
from lockstep.trainer.preload import preload
from lockstep.trainer.session import train

log = logging.getLogger(__name__)


def run_node(task: NodeTask, agents: World, run: Run, attempt: int, notes: list[str]) -> int:
    """Train with the ranks of this node, restart them as long as the restart policy says so, and return the exit status.

    Args:
        agents: This agent among those of all nodes.
        notes: Lines for the log of rank zero.

    Raises:
        UsageError: The config is not valid, or a module of the user has initialized CUDA.
        RunError: Another agent has not connected.
    """
    parsed = parse_config(task.arguments, task.command)
    config = parsed[1]
    preload(config, agents.is_rank_zero)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise UsageError(
            "A module that the config names initializes CUDA when it is imported, and a process that has done so cannot start "
            "ranks; create tensors on the GPU in the LightningModule instead."
        )
    key = job_key(os.environ)
    os.environ.pop("LOCKSTEP_KEY", None)
    shares = share_cpus(task.ranks, os.environ)

    def train_rank(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        if shares is not None:
            os.sched_setaffinity(0, shares[world.local_rank])
        setup_logging(world)
        for note in notes:
            log.info(note)
        log.info("%d ranks on %d nodes, rendezvous %s", world.size, world.nodes, world.rendezvous or "none")
        train(task.command, parsed, world, run, attempt, enter)

    def record(attempt: int, failure: Failure) -> None:
        first = record_failure(run, attempt, failure)
        write_failed_result(run, attempt, first)

    def next_attempt(status: int) -> int | None:
        if not config.run.warm_restarts:
            return None
        try:
            return restart_in_allocation(run, task.slurm, status, os.environ)
        except (LockstepError, OSError) as error:  # the batch script decides
            log.warning("the ranks are not restarted without srun (%s)", error)
            return None

    def log_file(world: World, attempt: int) -> Path:
        return run.log(attempt, world.rank, world.node_rank)

    plan = Plan(train_rank, log_file, phase_limits(config.run.hang_timeout_seconds), record, next_attempt)
    channel = Channel.open(agents, key, config.run.hang_timeout_seconds)
    return Agent(agents, task.ranks, channel, plan).run(attempt)
