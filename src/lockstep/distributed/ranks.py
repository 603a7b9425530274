"""Run all ranks of simulated nodes on this machine, for ``lockstep local`` and the tests."""

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lockstep.core import Interrupted, World
from lockstep.distributed.phases import PhaseBoard
from lockstep.distributed.rank_group import RankGroup, describe_stuck, first_failure, raise_interrupted
from lockstep.runs import Failure

T = TypeVar("T")

_GRACE_SECONDS = 3.0
"""How long the ranks may take to end after SIGTERM."""


class RankFailed(Exception):
    """A rank failed, and the other ranks were ended; ``failure`` is that of the rank that failed first."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"rank {failure.rank} of {failure.world_size} (node {failure.node}) failed: {failure.report}")
        self.failure = failure


def fork_ranks(
    target: Callable[[World], T],
    nodes: int = 1,
    ranks: int = 1,
    logs: Callable[[World], Path | None] = lambda world: None,
    board: PhaseBoard | None = None,
) -> list[T]:
    """Run ``target(world)`` in ``nodes`` × ``ranks`` forked processes and return the results, which must pickle, by rank.

    Args:
        logs, board: As in ``RankGroup``.

    Raises:
        RankFailed: Names the rank that failed first; the others have been ended.
        KeyboardInterrupt: Ctrl-C; all ranks have ended.
        Interrupted: SIGTERM; all ranks have ended.
    """
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        rendezvous = f"file://{folder}/rendezvous"
        worlds = [World(rank, nodes * ranks, rank % ranks, ranks, rendezvous, "local") for rank in range(nodes * ranks)]
        previous = signal.signal(signal.SIGTERM, raise_interrupted)
        group = None
        try:
            group = RankGroup(target, worlds, logs, board=board)
            return _collect(group)
        except (KeyboardInterrupt, Interrupted):
            # A terminal sends Ctrl-C to the ranks too: let them save and stop together. A second Ctrl-C ends the wait.
            if group is not None:
                group.join(_GRACE_SECONDS)
                group.signal(signal.SIGTERM)
                group.join()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
            if group is not None:
                group.signal(signal.SIGTERM)
                if stuck := group.close(_GRACE_SECONDS):
                    print(f"{describe_stuck(stuck)} Ctrl-C ends the wait for it.", file=sys.stderr, flush=True)


def _collect(group: RankGroup) -> list[Any]:
    """The results of all ranks, by rank; raises RankFailed for the one that failed first."""
    deadline: float | None = None
    interval = 1.0  # the phases are watched in between
    while group.running and (deadline is None or time.monotonic() < deadline):
        new, _ = group.poll(interval if deadline is None else max(0.0, min(interval, deadline - time.monotonic())))
        # The peers of a failed rank fail too, and may report sooner: wait for all reports before naming the first failure.
        # A stop signal sets no deadline, because the ranks still have work to finish.
        if deadline is None and any(outcome.ends_others for outcome in new):
            deadline = time.monotonic() + 0.3
    if failure := first_failure(group.outcomes.values()):
        raise RankFailed(replace(failure, host=""))  # all ranks are on this machine
    return [group.outcomes[rank].result for rank in range(len(group.ranks))]
