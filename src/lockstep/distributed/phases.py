"""The phases of a rank, from its fork to its end, in memory that it shares with the process that forked it.

A rank has no watchdog before its first step. Its agent reads the phase instead, and knows how long each may take.
"""

import mmap
import struct
import time
from collections.abc import Callable, Mapping

PHASES = ("rendezvous", "compile", "model", "data", "first step", "running", "closing")
"""In the order in which a rank passes through them. In ``closing`` it closes its loggers, also after a failure."""

_TIMES_HANG_TIMEOUT = {"rendezvous": 1, "compile": 6, "model": 4, "data": 24, "first step": 4}
"""Limit of each phase as a multiple of ``run.hang_timeout_seconds``. Data may be downloaded; later phases have the watchdog."""

_LEAST_SECONDS = 60.0

_WAITING_SECONDS = 30.0
"""Extra time for a rank that waits: the rank that hangs may have entered its phase later."""

STARTING_PHASES = tuple(_TIMES_HANG_TIMEOUT)

_SLOT = struct.Struct("=bd")


def phase_limits(hang_timeout_seconds: float) -> dict[str, float]:
    """Seconds in each phase after which a rank counts as hanging."""
    return {phase: max(_LEAST_SECONDS, times * hang_timeout_seconds) for phase, times in _TIMES_HANG_TIMEOUT.items()}


class PhaseBoard:
    """The phase of each of several ranks; create it before they are forked.

    Args:
        limits: Seconds that each phase may last; others have no limit.
    """

    def __init__(self, ranks: int, limits: Mapping[str, float]) -> None:
        self.limits = limits
        self._memory = mmap.mmap(-1, _SLOT.size * ranks)
        for index in range(ranks):
            self.reporter(index)(PHASES[0])

    def reporter(self, index: int) -> Callable[[str], None]:
        """A function with which the rank of this index reports the phase that it enters."""

        def enter(phase: str) -> None:
            _SLOT.pack_into(self._memory, index * _SLOT.size, PHASES.index(phase), time.monotonic())

        return enter

    def phase(self, index: int) -> tuple[str, float]:
        """The phase of a rank, and when it entered it, by the monotonic clock."""
        number, since = _SLOT.unpack_from(self._memory, index * _SLOT.size)
        return PHASES[number], since

    def is_overdue(self, index: int, waits: bool) -> bool:
        """Whether a rank has exceeded the limit of its phase; one that ``waits`` for another rank has the longest limit."""
        phase, since = self.phase(index)
        limit = self.limits.get(phase, float("inf"))
        if waits and phase in self.limits:
            limit = max(self.limits.values()) + _WAITING_SECONDS
        return time.monotonic() - since > limit
