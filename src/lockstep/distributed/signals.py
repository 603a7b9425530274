"""Stopping together: signals set a flag, and the ranks agree on the step after which all of them stop.

Every so many steps, about four times a second, the ranks start one small all-reduce over gloo and look at the result of the
one before, which has long been there: nobody waits for a device or for another rank. All ranks look after the same step, so
whatever the result says, they do it together.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Whatever Slurm, an administrator or a person at the keyboard sends to end a run in good order."""


class SignalReceiver:
    """What this process has been told; a handler notes it and does nothing else.

    A second Ctrl-C does what Ctrl-C always does.

    Attributes:
        received: The first one, None before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Note the signals in here; before and after, where nothing is to be saved, they do what they do."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
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


def block_signals(*signals: signal.Signals) -> None:
    """Leave it to the rank what these signals mean: for processes that a rank has started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)


def allocation_end_time() -> float | None:
    """When the job's time is over, in seconds since 1970, as ``again`` was told by Slurm; None where there is no such time."""
    end = os.environ.get("LOCKSTEP_ENDS", "0")
    return float(end) or None
