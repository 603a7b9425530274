"""Import many modules at the start of a process."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import modules in the block without garbage collections, which take a quarter of the time of importing torch.

    Later collections do not visit what exists at its end. For the start of a process, before it has objects of its own.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # nanobind prints a warning about objects that the last collection does not visit
        if was_enabled:
            gc.enable()
