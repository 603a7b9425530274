"""Workers of ``lockstep pack`` that send results of any size, and one that is killed while it sends."""

import os
import signal
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

from lockstep.core import RunError
from lockstep.pack.workers import Totals, Workers


def ignore(_: Totals) -> None:
    """Show nothing."""


def test_results_of_any_size_arrive_by_number() -> None:
    def work(number: int, packed: Callable[[int], None]) -> bytes:
        packed(1)
        return bytes([number]) * (number * 100_000)

    expected = {number: bytes([number]) * (number * 100_000) for number in range(20)}
    for count in (0, 1, 3):
        assert Workers(count, ignore).run(work, range(20)) == expected


@pytest.mark.timeout(60)
def test_a_worker_that_is_killed_while_it_sends_is_named() -> None:
    def work(number: int, packed: Callable[[int], None]) -> bytes:
        if number:
            time.sleep(50)  # holds on to all that it has inherited

        def send_half(connection: Connection, content: bytes) -> None:
            os.write(connection.fileno(), struct.pack("!i", len(content)) + bytes(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send_bytes = send_half  # type: ignore[attr-defined]  # of this process alone
        return bytes(30_000)

    with pytest.raises(RunError, match="A worker ended with SIGKILL"):
        Workers(2, ignore).run(work, range(2))
