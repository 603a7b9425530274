"""Imports without garbage collections."""

import subprocess
import sys

SCRIPT = """
import gc
from lockstep.core import fast_imports
try:
    with fast_imports():
        assert not gc.isenabled()
        kept = [[] for _ in range(10_000)]
        raise ImportError
except ImportError:
    pass
assert gc.isenabled() and gc.get_freeze_count() > 10_000
gc.disable()
with fast_imports():
    pass
assert not gc.isenabled()
import atexit
atexit._run_exitfuncs()
assert gc.get_freeze_count() == 0
"""


def test_imports_are_not_interrupted_and_not_visited_later() -> None:
    """The collector is as before afterwards, also after an error; at the exit it visits everything again."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
