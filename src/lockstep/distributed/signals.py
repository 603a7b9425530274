"""Signals that ask a run to stop."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that Slurm, an administrator or a user sends to stop a run cleanly."""


class SignalReceiver:
    """Records the first stop signal of this process in ``received``; the ranks act on it between two steps.

    A second Ctrl-C raises KeyboardInterrupt as usual.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Record stop signals inside the block; restore the previous handlers after it."""
        previous = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        elif number == signal.SIGINT:
            signal.default_int_handler(number, frame)


def allocation_end_time() -> float | None:
    """End of the Slurm allocation in seconds since 1970, from the batch script; None without a time limit."""
    return float(os.environ.get("LOCKSTEP_ENDS", "0")) or None
