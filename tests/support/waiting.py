"""Wait until a condition holds."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], seconds: float = 30, describe: Callable[[], object] = str, interval: float = 0.1
) -> T:
    """Poll ``condition`` until it is true, and return what it returned.

    Args:
        condition: What must become true.
        seconds: Time limit.
        describe: What the error shows.
        interval: Seconds between two polls.

    Raises:
        AssertionError: The condition did not hold in time.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not true after {seconds:g} s: {describe()}"
        time.sleep(interval)
    return value
