"""The ranks of this machine, forked from a process that has already imported torch and Lightning.

Importing takes longer than many tests, and forking takes no time. CUDA must not be initialized before the fork.
"""

import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from operator import itemgetter
from pathlib import Path
from typing import Any

from lockstep.core import SIGNAL_EXIT_STATUSES, Interrupted, Stopped, World
from lockstep.distributed.memory_cgroup import MemoryWatch
from lockstep.distributed.phases import PhaseBoard
from lockstep.distributed.signals import STOP_SIGNALS
from lockstep.runs import Failure, signal_name

_KILL_SECONDS, _CLOSING_SECONDS = 1.0, 30.0
"""How long a rank may take to end after ``RankGroup.end``, and how long if it is closing its loggers."""

STUCK_SECONDS = 10.0
"""How long the kernel may take to end a process after SIGKILL, before it counts as stuck."""


@dataclass(frozen=True)
class RankOutcome:
    """How a rank has ended.

    Attributes:
        together: Whether it stopped for a signal at the same step as all others.
        time: In seconds since 1970.
    """

    result: Any = None
    failure: Failure | None = None
    together: bool = False
    time: float = field(default_factory=time.time)

    @property
    def ends_others(self) -> bool:
        """Whether the other ranks cannot finish without this one."""
        return self.failure is not None and not self.together


class _RankProcess:
    """A forked rank: its process, the pipe for its outcome, and a descriptor that becomes readable when it ends."""

    def __init__(self, main: "_RankMain", world: World, log: Path | None) -> None:
        context = multiprocessing.get_context("fork")
        self.world = world
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=main, args=(world, sender, log, os.getpid(), self.stacks.fileno()))
        self.process.start()
        # Before the next fork: the pipe of this rank would stay open if a later rank inherited the sending end.
        sender.close()
        # Not Process.sentinel, a pipe whose other end the DataLoader workers of a dead rank keep open.
        self.end = os.pidfd_open(self.process.pid or 0) if sys.platform == "linux" else os.dup(self.process.sentinel)

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def close(self) -> None:
        os.close(self.end)
        self.receiver.close()
        self.stacks.close()


Handlers = Mapping[int, Any]
"""Handlers of signals, by number."""


@dataclass(frozen=True)
class _RankMain:
    """The main function of a forked rank."""

    target: Callable[[World], Any]
    handlers: Handlers
    on_fork: Callable[[], None]

    def __call__(self, world: World, sender: Connection, log: Path | None, parent: int, stacks: int) -> None:
        """Run ``target``, send its result or failure, and exit."""
        set_process_name(f"rank-{world.rank}")
        if sys.platform == "linux":
            # PR_SET_PDEATHSIG: Linux kills this process when its parent ends, even after SIGKILL.
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
        gc.freeze()  # a garbage collection would touch, and so copy, all memory that is shared with the parent
        self.on_fork()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if log is not None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(file, 1)
            os.dup2(file, 2)
            # Python's streams too: in the parent, sys.stdout may be something other than file descriptor 1.
            sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
        faulthandler.register(signal.SIGQUIT, stacks, all_threads=True)
        os.environ.update(world.environ())
        status = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            sender.send(RankOutcome(self.target(world)))
            status = 0
        except BaseException as error:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            failure = Failure.from_exception(error, world)
            status = failure.exit_status
            if failure.is_secondary:
                print(f"lockstep: this rank ended because it lost another one ({failure.report.splitlines()[-1]})")
            elif log is not None and world.rank and not failure.is_interruption:  # the log of rank zero has the first failure
                print(f"lockstep: {failure.report}")
            stopped = error.__cause__
            sender.send(RankOutcome(failure=failure, together=isinstance(stopped, Stopped) and stopped.together))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # skips the exit handlers, which would wait for DataLoader workers and threads


def set_process_name(name: str) -> None:
    """Set the name of this process in ``ps -o comm`` and ``top``, at most 15 characters.

    It must not contain spaces: Slurm's proctrack/linuxproc would not find the process in ``/proc``, and so not kill it.
    """
    assert " " not in name
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(15, name.encode())  # PR_SET_NAME


def raise_interrupted(number: int, frame: object) -> None:
    """Handle a signal before training, when there is nothing to save; ignore further ones, which would disturb the exit."""
    signal.signal(number, signal.SIG_IGN)
    raise Interrupted(128 + number)


class RankGroup:
    """Ranks that this process has forked.

    Args:
        target: What each rank runs; its result must pickle.
        logs: The log file of a rank; None inherits this process's output.
        handlers: Signal handlers that a rank starts with.
        board: The phases of these ranks before training, by their index in ``worlds``.
        on_fork: Called first in each rank, for example to close what it inherits.
    """

    def __init__(
        self,
        target: Callable[[World], Any],
        worlds: Sequence[World],
        logs: Callable[[World], Path | None] = lambda world: None,
        handlers: Handlers | None = None,
        board: PhaseBoard | None = None,
        on_fork: Callable[[], None] = lambda: None,
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._board = board
        self._waiting: dict[int, tuple[str, float]] = {}  # ranks that have waited too long for others: phase and its start
        self._ended_at: float | None = None
        self._memory = MemoryWatch()
        self.outcomes: dict[int, RankOutcome] = {}
        self.ranks: list[_RankProcess] = []
        main = _RankMain(target, handlers or {signal.SIGTERM: signal.SIG_DFL}, on_fork)
        # A rank that receives a signal before it sets its handlers would run those of this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for world in worlds:
                self.ranks.append(_RankProcess(main, world, logs(world)))
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    @property
    def running(self) -> list[_RankProcess]:
        """The ranks that have not ended."""
        return [rank for rank in self.ranks if rank.world.rank not in self.outcomes]

    def poll(self, timeout: float | None = None, others: Sequence[Any] = ()) -> tuple[list[RankOutcome], list[Any]]:
        """Wait until a rank ends or one of ``others`` is ready, at most for ``timeout``; return new outcomes and what is ready.

        It kills ranks that hang in a phase, and after ``end`` those that take too long. The outcome says where a rank hung.
        """
        running = self.running
        ready = wait([*(handle for rank in running for handle in (rank.receiver, rank.end)), *others], timeout)
        new = {rank.world.rank: self._receive(rank) for rank in running if rank.receiver in ready or rank.end in ready}
        self.outcomes |= new
        new |= self._kill_hung_ranks()
        self.outcomes |= new
        if self._ended_at is not None:
            self._kill_late(time.monotonic() - self._ended_at)
        return list(new.values()), [other for other in others if other in ready]

    def signal(self, number: int) -> None:
        """Send a signal to all ranks that have not ended."""
        self._signal(self.ranks, number)

    def _signal(self, ranks: Iterable[_RankProcess], number: int) -> None:
        for rank in ranks:
            if rank.world.rank not in self.outcomes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, number)

    def _is_closing(self, index: int) -> bool:
        return self._board is not None and self._board.phase(index)[0] == "closing"

    def end(self) -> None:
        """Send SIGTERM to the ranks, except those that close their loggers; ``poll`` kills those that do not end."""
        if self._ended_at is None:
            self._ended_at = time.monotonic()
            self._signal([rank for index, rank in enumerate(self.ranks) if not self._is_closing(index)], signal.SIGTERM)

    def join(self, seconds: float | None = None) -> None:
        """Wait for all ranks to end, at most for ``seconds``."""
        deadline = None if seconds is None else time.monotonic() + seconds
        for rank in self.ranks:
            rank.process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def close(self, seconds: float = 0.0) -> list[str]:
        """Kill the ranks that are left after ``seconds``, and return the names of those that the kernel does not end."""
        self.join(seconds)
        for rank in self.ranks:
            rank.process.kill()
        self.join(STUCK_SECONDS)
        stuck = [
            f"rank {rank.world.rank} (process {rank.pid}) on {platform.node()}"
            for rank in self.ranks
            if rank.process.is_alive()
        ]
        for rank in self.ranks:
            rank.close()
        self.ranks = []
        return stuck

    def _receive(self, rank: _RankProcess) -> RankOutcome:
        with contextlib.suppress(EOFError):
            if rank.receiver.poll():
                outcome: RankOutcome = rank.receiver.recv()
                return self._blame_memory(outcome)
        rank.process.join(1)
        code = rank.process.exitcode
        status = 128 - code if code is not None and code < 0 else code
        if status in SIGNAL_EXIT_STATUSES:
            failure = Failure.from_report(f"it was ended by {signal_name(status)}.", rank.world)
            return RankOutcome(failure=replace(failure, exit_status=status))
        is_killed = code == -signal.SIGKILL
        is_out_of_memory = is_killed and self._memory.has_killed
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}" + (f": {self._memory}" if is_out_of_memory else "")
        else:
            how = f"exited with status {code} and without a report"
        failure = replace(Failure.from_report(f"The process {how}.", rank.world), is_killed=is_killed)
        if self._ended_at is not None:  # this process killed it because of another failure
            failure = replace(failure, is_secondary=True)
        # A killed rank sends nothing, and its peers may report earlier than its end is noticed: date it back.
        return RankOutcome(failure=replace(failure, is_out_of_memory=is_out_of_memory), time=time.time() - 0.2)

    def _blame_memory(self, outcome: RankOutcome) -> RankOutcome:
        """Add the reason if a rank failed because the kernel killed one of its processes, such as a DataLoader worker."""
        failure = outcome.failure
        if failure is None or "killed by signal: Killed" not in failure.report or not self._memory.has_killed:
            return outcome
        report = failure.report.rstrip(" .\n") + f". The kernel killed it: {self._memory}."
        return replace(outcome, failure=replace(failure, report=report, is_out_of_memory=True))

    def _kill_hung_ranks(self) -> dict[int, RankOutcome]:
        """Kill each rank that hangs in a phase; its outcome has its stacks, and says whether it waits for another rank."""
        if self._board is None or self._ended_at is not None:
            return {}
        overdue = [
            (index, rank)
            for index, rank in enumerate(self.ranks)
            if rank.world.rank not in self.outcomes
            and self._board.is_overdue(index, waits=self._waiting.get(index) == self._board.phase(index))
        ]
        for _, rank in overdue:
            rank.stacks.seek(0)
            rank.stacks.truncate()
            os.kill(rank.pid, signal.SIGQUIT)
        if overdue:
            time.sleep(1.0)
        found = {}
        for index, rank in overdue:
            rank.stacks.seek(0)
            stacks = rank.stacks.read().decode(errors="replace")
            main = re.split(r"^(?=Current thread|Thread)", stacks, flags=re.MULTILINE)[-1]
            is_waiting = "torch/distributed/" in main
            phase, since = self._board.phase(index)
            if not self._board.is_overdue(index, waits=False):  # it has left the phase meanwhile
                continue
            if is_waiting and self._waiting.get(index) != (phase, since):
                self._waiting[index] = phase, since
                continue
            os.kill(rank.pid, signal.SIGKILL)
            seconds = time.monotonic() - since
            what = "waits for another rank" if is_waiting else "hangs"
            report = (
                f"{stacks}It {what}: no progress for {seconds:.0f} s in the phase {phase!r}, before the first step. If that "
                "may take longer, raise run.hang_timeout_seconds."
            )
            failure = replace(Failure.from_report(report, rank.world), is_secondary=is_waiting)
            found[rank.world.rank] = RankOutcome(failure=failure)
        return found

    def _kill_late(self, seconds: float) -> None:
        for index, rank in enumerate(self.ranks):
            limit = _CLOSING_SECONDS if self._is_closing(index) else _KILL_SECONDS
            if rank.world.rank not in self.outcomes and seconds > limit:
                rank.process.kill()
                if seconds > _CLOSING_SECONDS + STUCK_SECONDS:
                    failure = Failure.from_report("The kernel does not end the process.", rank.world)
                    self.outcomes[rank.world.rank] = RankOutcome(failure=replace(failure, is_secondary=True))


def describe_stuck(names: Iterable[str]) -> str:
    """A line that names the processes that ``RankGroup.close`` could not end."""
    return f"lockstep: the kernel does not end {', '.join(sorted(names))}, which may wait for a device or a file system."


def first_failure(outcomes: Iterable[RankOutcome]) -> Failure | None:
    """The first failure, preferably one that another rank did not cause; None if no rank failed."""
    failed = [(not failure.is_cause, outcome.time, failure) for outcome in outcomes if (failure := outcome.failure) is not None]
    return min(failed, key=itemgetter(0, 1))[2] if failed else None
