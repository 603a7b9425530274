"""Convert what ends a run besides errors: signals, Ctrl-C, and ``sys.exit`` in user code."""

import logging

from lockstep.core import Interrupted, RunError, Stopped
from lockstep.runs import signal_name

log = logging.getLogger(__name__)


def normalize_error(error: BaseException) -> BaseException:
    """Convert ``Stopped`` and Ctrl-C to ``Interrupted``, and ``sys.exit`` in user code to ``RunError``."""
    if isinstance(error, Stopped):
        name = signal_name(128 + error.signal)
        log.info("stopped by %s after step %d; another attempt resumes from the newest checkpoint", name, error.step)
        return Interrupted(128 + error.signal)
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):  # Lightning's form of Ctrl-C
        return Interrupted(130)
    if isinstance(error, SystemExit) and not isinstance(error, Interrupted):
        return RunError(f"The run was ended by sys.exit({error.code!r}).")
    return error
