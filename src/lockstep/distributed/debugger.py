"""``breakpoint()`` in user code: pdb on the terminal of a run with one rank; otherwise an error that says why not."""

import os
import pdb
import signal
import sys
import threading
from bdb import BdbQuit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lockstep.core import RunError, World


class _Debugger(pdb.Pdb):
    """pdb that handles Ctrl-C at its prompt; while the program runs, Ctrl-C stops the run."""

    def __init__(self) -> None:
        super().__init__(nosigint=True)

    def cmdloop(self, intro: Any = None) -> None:
        if threading.current_thread() is not threading.main_thread():
            super().cmdloop(intro)
            return
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            super().cmdloop(intro)
        finally:
            signal.signal(signal.SIGINT, previous)


class _BreakpointHook:
    """``sys.breakpointhook`` while a rank runs; takes the arguments of ``breakpoints``."""

    def __init__(self, world: World, command: str, on_pause: Callable[[], None]) -> None:
        self._world, self._command, self._on_pause = world, command, on_pause
        self._pid, self.previous = os.getpid(), sys.breakpointhook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chosen = os.environ.get("PYTHONBREAKPOINT", "pdb.set_trace") or "pdb.set_trace"
        if chosen == "0":
            return None
        frame = sys._getframe(1)
        if why := self.reason_against():
            raise RunError(f"breakpoint() in {frame.f_code.co_filename}, line {frame.f_lineno}: {why}")
        self._on_pause()
        if chosen != "pdb.set_trace" or self.previous is not sys.__breakpointhook__:  # such as that of a notebook
            return self.previous(*args, **kwargs)
        _Debugger().set_trace(frame)
        return None

    def reason_against(self) -> str:
        """Why a debugger cannot work here, and what to do instead; empty if it can."""
        if os.getpid() != self._pid:
            return "a DataLoader worker has no terminal; load the data without workers, as with num_workers=0."
        if self._world.size > 1:
            return f"a debugger needs a run with one rank, and this one has {self._world.size}; use: {self._command}"
        if self.previous is sys.__breakpointhook__ and not _has_input():
            return f"a debugger needs a terminal, which this process does not have; use: {self._command}"
        return ""


@contextmanager
def breakpoints(world: World, command: str, on_pause: Callable[[], None]) -> Iterator[None]:
    """Let ``breakpoint()`` open a debugger if this is the only rank and has a terminal; else raise RunError in it.

    Args:
        command: A shell command that does the same with one rank in a terminal.
        on_pause: Called before the debugger opens, to stop what expects progress, such as the watchdog.

    Raises:
        RunError: The debugger was left with ``q``, or cannot work here.
    """
    hook = _BreakpointHook(world, command, on_pause)
    sys.breakpointhook = hook
    try:
        yield
    except BdbQuit:
        why = hook.reason_against()
        raise RunError(f"pdb: {why}" if why else "The run was ended in the debugger.") from None
    finally:
        sys.breakpointhook = hook.previous


def _has_input() -> bool:
    """Whether standard input may deliver something: it is not /dev/null, as in a forked process."""
    try:
        return sys.stdin is not None and not os.path.samestat(os.fstat(sys.stdin.fileno()), os.stat(os.devnull))
    except (OSError, ValueError):  # not a file
        return True
