"""Check whether an attempt still owns its run, without a file system query for each write."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lockstep.runs.run import Run

_HEARTBEAT_SECONDS = 15.0

OWNER_SECONDS = 1.0
"""How long it may take an attempt to notice that a newer one has claimed the run."""


@contextmanager
def claim_heartbeat(run: Run, attempt: int) -> Iterator[None]:
    """Touch the claim regularly: a sign of life during a long validation or data preparation, which write nothing."""
    stopped = threading.Event()

    def touch() -> None:
        while not stopped.wait(_HEARTBEAT_SECONDS):
            with suppress(OSError):  # a full disk must not end a run
                os.utime(run.claim(attempt))

    threading.Thread(target=touch, name="claim", daemon=True).start()
    try:
        yield
    finally:
        stopped.set()


class Ownership:
    """The claim of one attempt to its run.

    Call ``check_now`` before writes that may replace those of a newer attempt: results, status, checkpoints. The other two
    are cheap: they query the file system at most once in OWNER_SECONDS.
    """

    def __init__(self, run: Run, attempt: int) -> None:
        self.run, self.attempt = run, attempt
        self._is_lost, self._next_query = False, 0.0

    def is_lost(self) -> bool:
        """Whether a newer attempt has claimed the run, as of at most OWNER_SECONDS ago."""
        if not self._is_lost and time.monotonic() >= self._next_query:
            self._is_lost = self.run.is_superseded(self.attempt)
            self._next_query = time.monotonic() + OWNER_SECONDS
        return self._is_lost

    def check(self) -> None:
        """Raise Superseded if ``is_lost``."""
        if self.is_lost():
            raise self.run.superseded(self.attempt)

    def check_now(self) -> None:
        """Query the file system, and raise Superseded if a newer attempt has claimed the run."""
        self.run.check_owner(self.attempt)
