"""Signals that ask a run to stop."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that Slurm, an administrator or a user sends to stop a run cleanly."""


class SignalReceiver:
    """Records the first stop signal of this process; the ranks act on it between two steps.

    A second Ctrl-C raises KeyboardInterrupt as usual.

    Attributes:
        received: The first stop signal; None before it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the stop signals inside the block; restore the previous handlers after it."""
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


def block_signals(*signals: signal.Signals) -> None:
    """Block these signals in this process; for DataLoader workers, which their rank ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)


def allocation_end_time() -> float | None:
    """End of the Slurm allocation, in seconds since 1970; None without a time limit.

    The batch script sets LOCKSTEP_ENDS for each attempt.
    """
    return float(os.environ.get("LOCKSTEP_ENDS", "0")) or None
