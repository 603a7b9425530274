"""Stopping together: signals set a flag, and the ranks agree on the step after which all of them stop.

Every so many steps, about four times a second, the ranks start one small all-reduce over gloo and look at the result of the
one before, which has long been there: nobody waits for a device or for another rank. All ranks look after the same step, so
whatever the result says, they do it together.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed import ReduceOp, Work

from lockstep.core import World

_INTERVAL_SECONDS = 0.25
"""Time between two agreements."""


@dataclass(frozen=True)
class Decision:
    """What all ranks do after this step.

    Attributes:
        stop: Number of the signal to stop for; 0 goes on.
        save: Whether to save.
    """

    stop: int = 0
    save: bool = False


class StopConsensus:
    """The ranks' common decision at the boundary of two steps. Every rank must ask after every step.

    Args:
        world: Who agrees.
    """

    def __init__(self, world: World) -> None:
        self._group: Any = torch.distributed.new_group(backend="gloo") if world.size > 1 else None
        self._work: Work | None = None
        self._agreed = np.zeros(3, dtype=np.int64)
        self._asked = 0
        self._next = 1
        self._since = time.monotonic()

    def poll(self, stop: int, save: bool) -> Decision:
        """What is to be done after this step, as all ranks answer alike.

        Args:
            stop: What this rank would stop for; 0 for nothing.
            save: Whether this rank wants to save.
        """
        if self._group is None:
            return Decision(stop, save)
        self._asked += 1
        if self._asked < self._next:
            return Decision()
        agreed = Decision()
        interval = 1
        if self._work is not None:
            self._work.wait()
            agreed, interval = Decision(int(self._agreed[0]), bool(self._agreed[1])), int(self._agreed[2])
        now = time.monotonic()
        steps = max(1, int(interval * _INTERVAL_SECONDS / max(now - self._since, 1e-4)))
        self._since = now
        self._agreed[:] = stop, save, min(steps, 4 * interval, 10_000)
        shared = torch.from_numpy(self._agreed)  # the result comes into the same memory
        self._work = torch.distributed.all_reduce(shared, ReduceOp.MAX, group=self._group, async_op=True)
        self._next = self._asked + interval
        return agreed

    def reduce_max(self, number: int, on_wait: Callable[[], None] = lambda: None) -> int:
        """The largest number that a rank has given, on all of them; waits for all, and calls ``on_wait`` then."""
        if self._group is None:
            return number
        shared = torch.tensor(number)
        work = torch.distributed.all_reduce(shared, ReduceOp.MAX, group=self._group, async_op=True)
        pause = 0.0005
        while not work.is_completed():
            time.sleep(pause)
            pause = min(0.1, 2 * pause)
            on_wait()
        work.wait()
        return int(shared)

    def close(self) -> None:
        """Wait for the last one, so that nobody leaves while another still counts on it."""
        if self._work is not None:
            self._work.wait()
            self._work = None
