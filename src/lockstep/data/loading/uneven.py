"""End an epoch on all ranks together if their loaders may have different numbers of batches.

Otherwise a rank that has ended would leave the others waiting in a collective until a time-out.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lockstep.core import World
from lockstep.distributed import new_group

log = logging.getLogger(__name__)

_SHOWN = 8
"""How many ranks a message names."""


class SharedEnd:
    """Tells all ranks which of them have no batch left; every rank must call its methods in the same order."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._group: Any = None

    @property
    def is_needed(self) -> bool:
        """Whether there are other ranks."""
        return self.world.size > 1 and torch.distributed.is_initialized()

    def _shared(self) -> Any:
        if self._group is None:  # apart from all other collectives: a batch is fetched while another one trains
            self._group = new_group(self.world)
        return self._group

    def ended_ranks(self, has_ended: bool) -> list[int]:
        """The ranks that have ended."""
        flag = torch.tensor(int(has_ended), device="cpu")
        torch.distributed.all_reduce(flag, group=self._shared())
        return [rank for rank, ended in enumerate(self._gather(int(has_ended))) if ended] if flag else []

    def shortest(self, what: str, length: int | None) -> int | None:
        """The smallest ``length`` of any rank, None if one has none; a warning on rank zero if they differ."""
        lengths = self._gather(-1 if length is None else length)
        if self.world.is_rank_zero and len(set(lengths)) > 1 and min(lengths) >= 0:
            shown = ", ".join(f"rank {rank}: {number}" for rank, number in enumerate(lengths[:_SHOWN]))
            more = f", … rank {len(lengths) - 1}: {lengths[-1]}" if len(lengths) > _SHOWN else ""
            text = "data: ranks have different numbers of batches for %s (%s%s); it ends after %d on all, the rest is left out"
            log.warning(text, what, shown, more, min(lengths))
        return None if min(lengths) < 0 else min(lengths)

    def report(self, what: str, ended: Sequence[int], batches: int) -> None:
        """Warn on rank zero that some ranks have ended before the others."""
        others = [rank for rank in range(self.world.size) if rank not in ended]
        if self.world.is_rank_zero and others:
            text = (
                "data: %s ends after %d batches on all ranks because %s ended; the other batches of %s are left out; "
                "give all ranks equally many (with drop_last, or an endless stream and trainer.limit_train_batches)"
            )
            log.warning(text, what, batches, _name(ended), _name(others))

    def _gather(self, number: int) -> list[int]:
        values = [torch.empty((), dtype=torch.int64, device="cpu") for _ in range(self.world.size)]
        torch.distributed.all_gather(values, torch.tensor(number, device="cpu"), group=self._shared())
        return [int(value) for value in values]


def _name(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    return f"rank{'s' * (len(ranks) > 1)} {shown}{f' and {len(ranks) - _SHOWN} more' if len(ranks) > _SHOWN else ''}"


class EvenLoader(DataLoader[Any]):
    """A base class that an unsharded DataLoader of evaluation gets besides its own class: it ends on all ranks together.

    Attributes:
        end: The ``SharedEnd`` of the run.
        what: The loop that iterates over it, for messages.
        length: Batches on all ranks; None if it is unknown.
    """

    end: SharedEnd
    what: str
    length: int | None

    def __len__(self) -> int:
        return super().__len__() if self.length is None else self.length

    def __iter__(self) -> Any:
        return self._until_shared_end(super().__iter__())

    def _until_shared_end(self, batches: Iterator[Any]) -> Iterator[Any]:
        none, number = object(), 0
        while True:
            batch = next(batches, none)
            if ended := self.end.ended_ranks(batch is none):
                self.end.report(self.what, ended, number)
                return
            yield batch
            number += 1
