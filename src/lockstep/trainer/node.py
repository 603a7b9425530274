"""Train on one node of a Slurm job: import and parse the config once, then fork the ranks for each attempt."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from lockstep.core import LockstepError, World, count, setup_logging
from lockstep.distributed import Agent, Channel, Plan, phase_limits, share_cpus
from lockstep.runs import Failure, Run, record_failure, write_failed_result
from lockstep.slurm import NodeTask, restart_in_allocation
from lockstep.trainer.config_parser import parse_config
from lockstep.trainer.preload import copy_shards, preload
from lockstep.trainer.session import train

log = logging.getLogger(__name__)


class Node:
    """One node of a Slurm job. The constructor imports and parses what its ranks need.

    Args:
        agents: This agent among those of all nodes.
        notes: Lines for the log of rank zero.

    Raises:
        UsageError: The config is not valid.
    """

    def __init__(self, task: NodeTask, agents: World, run: Run, attempt: int, notes: list[str]) -> None:
        self.task, self.agents, self.run_folder, self.attempt, self.notes = task, agents, run, attempt, notes
        self.parsed = parse_config(task.arguments, task.command)
        self.options = self.parsed[1].run
        preload(self.parsed[1], agents.is_rank_zero)
        self.shares = share_cpus(task.ranks, os.environ)
        copy_shards(task.command, self.parsed[1], agents)

    def run(self) -> int:
        """Train with the ranks of this node, restart them while the restart policy allows, and return the exit status.

        Raises:
            PeerError: Another agent did not connect.
        """
        key = os.environ.pop("LOCKSTEP_KEY", "").encode()
        limits = phase_limits(self.options.hang_timeout_seconds)
        plan = Plan(self._train, self._log, limits, self._record, self._next_attempt)
        channel = Channel.open(self.agents, key, self.options.hang_timeout_seconds)
        return Agent(self.agents, self.task.ranks, channel, plan).run(self.attempt)

    def _train(self, world: World, attempt: int, enter: Callable[[str], None]) -> None:
        """Run one attempt as one rank."""
        if self.shares is not None:
            os.sched_setaffinity(0, self.shares[world.local_rank])
        setup_logging(world)
        for note in self.notes:
            log.info(note)
        log.info("%s on %s, rendezvous %s", count(world.size, "rank"), count(world.nodes, "node"), world.rendezvous or "none")
        train(self.task.command, self.parsed, world, self.run_folder, attempt, enter)

    def _log(self, world: World, attempt: int) -> Path:
        return self.run_folder.log(attempt, world.rank, world.node_rank)

    def _record(self, attempt: int, failure: Failure) -> None:
        write_failed_result(self.run_folder, attempt, record_failure(self.run_folder, attempt, failure))

    def _next_attempt(self, status: int) -> int | None:
        if not self.options.warm_restarts:
            return None
        try:
            return restart_in_allocation(self.run_folder, self.task.slurm, status, os.environ)
        except (LockstepError, OSError) as error:
            log.warning("the agents cannot restart the ranks (%s); the batch script decides", error)
            return None
