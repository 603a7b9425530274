"""Consensus of all ranks on the step after which they stop or save.

About four times a second, all ranks start one small all-reduce over gloo after the same step. They read the result of the
previous one, which has completed by then. So a step waits neither for the device nor for another rank.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp, Work

from lockstep.compat.torch import default_store
from lockstep.core import PeerError, World

_INTERVAL_SECONDS = 0.25

_MEETING_SECONDS = 60.0
"""How long a rank waits for the others in ``all_meet``: longer than a rank can be behind the first one after a step."""


def all_meet(place: str, world: World) -> bool:
    """Whether all ranks call this with the same ``place``, which names a point in training; the same answer on every rank.

    Ranks that never call it need not do anything; the others wait for a minute before the answer is no.

    Raises:
        PeerError: All ranks have called it, but this one a minute later than the first.
    """
    if world.size == 1:
        return True
    store, answer, deadline = default_store(), f"lockstep/answer/{place}", time.monotonic() + _MEETING_SECONDS
    is_last = store.add(f"lockstep/count/{place}", 1) == world.size
    while not is_last and not store.check([answer]) and time.monotonic() < deadline:
        time.sleep(0.02)
    is_met = bool(store.compare_set(answer, "", "yes" if is_last else "no") == b"yes")
    if is_last and not is_met:
        raise PeerError(f"Rank {world.rank} was more than {_MEETING_SECONDS:g} s behind the others at {place}; resume the run.")
    return is_met


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step: stop for the signal with the number ``stop`` (0: continue), and save a checkpoint."""

    stop: int = 0
    save: bool = False


class StopConsensus:
    """Reaches the same decision on all ranks; every rank must call ``poll`` after every optimizer step."""

    def __init__(self, world: World) -> None:
        self._group: Any = torch.distributed.new_group(backend="gloo") if world.size > 1 else None
        self._work: Work | None = None
        self._reduced = torch.tensor([0, 0, 1], device="cpu")  # stop, save, steps until the next all-reduce
        self._exchange: tuple[Work, Tensor] | None = None
        self._step = 0
        self._next_step = 1
        self._last_time = time.monotonic()

    def poll(self, stop: int, save: bool) -> Decision:
        """The decision for this step, equal on all ranks; the arguments say what this rank wants, as in ``Decision``."""
        if self._group is None:
            return Decision(stop, save)
        self._step += 1
        if self._step < self._next_step:
            return Decision()
        if self._work is not None:
            self._work.wait()
        agreed_stop, agreed_save, interval = self._reduced.tolist()
        now = time.monotonic()
        steps = max(1, int(interval * _INTERVAL_SECONDS / max(now - self._last_time, 1e-4)))
        self._last_time = now
        self._reduced = torch.tensor([stop, save, min(steps, 4 * interval, 10_000)], device="cpu")
        self._work = torch.distributed.all_reduce(self._reduced, ReduceOp.MAX, group=self._group, async_op=True)
        self._next_step = self._step + interval
        return Decision(agreed_stop, bool(agreed_save))

    def exchange_min(self, number: int) -> int:
        """The minimum of ``number`` and of the numbers of all ranks in their previous call; does not wait for the others."""
        if self._group is None:
            return number
        if self._exchange is not None:
            work, reduced = self._exchange
            work.wait()
            number = min(number, int(reduced))
        reduced = torch.tensor(number, device="cpu")
        work = torch.distributed.all_reduce(reduced, ReduceOp.MIN, group=self._group, async_op=True)
        self._exchange = work, reduced
        return number

    def reduce_max(self, number: int, on_wait: Callable[[], None] = lambda: None) -> int:
        """The maximum of ``number`` over all ranks; calls ``on_wait`` repeatedly while it waits for them."""
        if self._group is None:
            return number
        return int(self._all_reduce(torch.tensor(number), ReduceOp.MAX, on_wait))

    def total(self, number: int) -> int:
        """The sum of ``number`` over all ranks."""
        return number if self._group is None else int(self._all_reduce(torch.tensor(number), ReduceOp.SUM))

    def is_equal(self, values: Tensor) -> bool:
        """Whether ``values``, int64 on the CPU, are equal on all ranks."""
        if self._group is None:
            return True
        highest, lowest = self._all_reduce(torch.stack([values, ~values]), ReduceOp.MAX)
        return torch.equal(highest, ~lowest)

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """``values`` of every rank, by rank."""
        if self._group is None:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, values, group=self._group)
        return gathered

    def _all_reduce(self, shared: Tensor, operation: Any, on_wait: Callable[[], None] = lambda: None) -> Tensor:
        work = torch.distributed.all_reduce(shared, operation, group=self._group, async_op=True)
        pause = 0.0005
        while not work.is_completed():
            time.sleep(pause)
            pause = min(0.1, 2 * pause)
            on_wait()
        work.wait()
        return shared

    def close(self) -> None:
        """Wait for pending collectives, so that no rank exits while another still needs it."""
        for work in (self._work, self._exchange and self._exchange[0]):
            if work is not None:
                work.wait()
        self._work = self._exchange = None
