"""Stopping together: signals set a flag, and the ranks agree on the step after which all of them stop.

Every so many steps, about four times a second, the ranks start one small all-reduce over gloo and look at the result of the
one before, which has long been there: nobody waits for a device or for another rank. All ranks look after the same step, so
whatever the result says, they do it together.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.distributed import ReduceOp, Work

from lockstep.world import World

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Whatever Slurm, an administrator or a person at the keyboard sends to end a run in good order."""

_SECONDS = 0.25
"""Time between two agreements."""


class Signals:
    """What this process has been told; a handler notes it and does nothing else.

    A second Ctrl-C does what Ctrl-C always does.

    Attributes:
        received: The first one, None before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Note the signals in here; before and after, where nothing is to be saved, they do what they do."""
        before = {number: signal.getsignal(number) for number in STOPPING}
        for number in STOPPING:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        elif number == signal.SIGINT:
            signal.default_int_handler(number, frame)


def ignore_signals(*signals: signal.Signals) -> None:
    """Leave it to the rank what these signals mean: for processes that a rank has started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)


@dataclass(frozen=True)
class Agreed:
    """What all ranks do after this step.

    Attributes:
        stop: Number of the signal to stop for; 0 goes on.
        save: Whether to save.
    """

    stop: int = 0
    save: bool = False


class Agreement:
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

    def ask(self, stop: int, save: bool) -> Agreed:
        """What is to be done after this step, as all ranks answer alike.

        Args:
            stop: What this rank would stop for; 0 for nothing.
            save: Whether this rank wants to save.
        """
        if self._group is None:
            return Agreed(stop, save)
        self._asked += 1
        if self._asked < self._next:
            return Agreed()
        agreed = Agreed()
        interval = 1
        if self._work is not None:
            self._work.wait()
            agreed, interval = Agreed(int(self._agreed[0]), bool(self._agreed[1])), int(self._agreed[2])
        now = time.monotonic()
        steps = max(1, int(interval * _SECONDS / max(now - self._since, 1e-4)))
        self._since = now
        self._agreed[:] = stop, save, min(steps, 4 * interval, 10_000)
        shared = torch.from_numpy(self._agreed)  # the result comes into the same memory
        self._work = torch.distributed.all_reduce(shared, ReduceOp.MAX, group=self._group, async_op=True)
        self._next = self._asked + interval
        return agreed

    def most(self, number: int, meanwhile: Callable[[], None] = lambda: None) -> int:
        """The largest number that a rank has given, on all of them; waits for all, and calls ``meanwhile`` then."""
        if self._group is None:
            return number
        shared = torch.tensor(number)
        work = torch.distributed.all_reduce(shared, ReduceOp.MAX, group=self._group, async_op=True)
        pause = 0.0005
        while not work.is_completed():
            time.sleep(pause)
            pause = min(0.1, 2 * pause)
            meanwhile()
        work.wait()
        return int(shared)

    def close(self) -> None:
        """Wait for the last one, so that nobody leaves while another still counts on it."""
        if self._work is not None:
            self._work.wait()
            self._work = None


def allocation_ends() -> float | None:
    """When the job's time is over, in seconds since 1970, as ``again`` was told by Slurm; None where there is no such time."""
    end = os.environ.get("LOCKSTEP_ENDS", "0")
    return float(end) or None
