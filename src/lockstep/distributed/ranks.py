"""Several ranks on one machine, forked from a process that has already imported torch and Lightning.

``launch/local.py`` and the tests use it: importing takes longer than many tests, and forking takes no time. CUDA must not be
initialized before the fork.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from lockstep.core import Interrupted, World
from lockstep.runs import Failure

T = TypeVar("T")

_GRACE_SECONDS = 3.0
"""How long a rank may take to end after SIGTERM."""


class RankFailed(Exception):
    """A rank failed, and the other ranks were ended; ``failure`` is that of the rank that failed first."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"rank {failure.rank} of {failure.world_size} (node {failure.node}) failed: {failure.report}")
        self.failure = failure


@dataclass(frozen=True)
class _Outcome:
    """What a rank sends when it ends: its result or its failure, and the time in seconds since 1970."""

    result: Any = None
    failure: Failure | None = None
    time: float = field(default_factory=time.time)


class _RankProcess:
    """A forked rank: its process, the pipe for its result, and a descriptor that becomes readable when it ends."""

    def __init__(self, target: Callable[[World], Any], world: World, log: Path | None) -> None:
        context = multiprocessing.get_context("fork")
        self.world = world
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_run_rank, args=(target, world, sender, log, os.getpid()))
        self.process.start()
        # Before the next fork: a later rank must not hold the sending end, or the pipe would not close when this rank ends.
        sender.close()
        # Process.sentinel is a pipe too, and a DataLoader worker of a dead rank still holds its other end.
        self.end = os.pidfd_open(self.process.pid or 0) if sys.platform == "linux" else os.dup(self.process.sentinel)


def fork_ranks(
    target: Callable[[World], T], nodes: int = 1, ranks: int = 1, logs: Callable[[int], Path] | None = None
) -> list[T]:
    """Run ``target(world)`` in ``nodes`` × ``ranks`` forked processes and return the results, which must pickle, by rank.

    Args:
        logs: The log file of a rank, used for every rank except zero; None inherits the caller's output.

    Raises:
        RankFailed: Names the rank that failed first; the others have been ended.
        KeyboardInterrupt: Ctrl-C; all ranks have ended.
        Interrupted: SIGTERM; all ranks have ended.
    """
    size = nodes * ranks
    forked: list[_RankProcess] = []
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        sys.stdout.flush()
        sys.stderr.flush()
        previous = signal.signal(signal.SIGTERM, _raise_interrupted)
        try:
            for rank in range(size):
                world = World(rank, size, rank % ranks, ranks, f"file://{folder}/rendezvous", "local")
                forked.append(_RankProcess(target, world, logs(rank) if logs is not None and rank else None))
            return _collect(forked)
        except (KeyboardInterrupt, Interrupted):
            # A terminal sends Ctrl-C to the ranks too: let them save and stop together. A second Ctrl-C ends the wait.
            _join(forked, _GRACE_SECONDS)
            _terminate(forked)
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
            _terminate(forked, _GRACE_SECONDS)
            for rank_process in forked:
                rank_process.process.kill()
                rank_process.process.join()
                os.close(rank_process.end)


def _raise_interrupted(*_: object) -> None:
    raise Interrupted(143)


def _run_rank(target: Callable[[World], Any], world: World, sender: Connection, log: Path | None, parent: int) -> None:
    """Run ``target`` in a forked process, send its result or failure, and exit."""
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: Linux kills this process when its parent ends, even after SIGKILL.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        # Python's streams too: in the parent, sys.stdout may be something other than file descriptor 1.
        sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    os.environ.update(world.environ())
    _select_gpus(world)
    status = 1
    try:
        sender.send(_Outcome(target(world)))
        status = 0
    except BaseException as error:
        failure = replace(Failure.from_exception(error, world), host="")  # all ranks are on this machine
        status = failure.exit_status
        if log is not None and not failure.is_permanent and not failure.is_interruption:
            traceback.print_exc()
        sender.send(_Outcome(failure=failure))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without the exit handlers of the parent


def _select_gpus(world: World) -> None:
    """Let this rank see the GPUs of its simulated node only; none if there are fewer GPUs than ranks."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if world.nodes > 1 and count:
        names = visible.split(",") if visible else [str(index) for index in range(count)]
        first = world.node_rank * world.local_size
        own = names[first : first + world.local_size] if world.size <= count else []
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)


def _collect(forked: Sequence[_RankProcess]) -> list[Any]:
    """The results of all ranks, by rank; raises RankFailed for the one that failed first."""
    outcomes: dict[int, _Outcome] = {}
    timeout: float | None = None
    while running := [rank for rank in forked if rank.world.rank not in outcomes]:
        ready = wait([handle for rank in running for handle in (rank.receiver, rank.end)], timeout)
        if not ready:
            break
        for rank in running:
            if rank.receiver in ready or rank.end in ready:
                outcome = outcomes[rank.world.rank] = _receive(rank)
                # Its peers fail too, and may report sooner: wait for them before naming the first. After a stop signal the
                # ranks still have work to finish, so there is no timeout.
                if outcome.failure is not None and not outcome.failure.is_interruption:
                    timeout = 0.3
    failed = [(outcome.time, rank, outcome.failure) for rank, outcome in outcomes.items() if outcome.failure is not None]
    if failed:
        raise RankFailed(min(failed)[2])
    return [outcomes[rank].result for rank in range(len(forked))]


def _receive(rank: _RankProcess) -> _Outcome:
    with contextlib.suppress(EOFError):
        if rank.receiver.poll():
            outcome: _Outcome = rank.receiver.recv()
            return outcome
    rank.process.join(1)
    code, world = rank.process.exitcode, rank.world
    how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with status {code}"
    # A killed rank fails before its peers notice, and sends nothing: date it back.
    failure = Failure(world.rank, world.size, world.node_rank, "", f"The process {how}.")
    return _Outcome(failure=failure, time=time.time() - 0.2)


def _terminate(forked: Sequence[_RankProcess], seconds: float | None = None) -> None:
    for rank in forked:
        rank.process.terminate()
    _join(forked, seconds)


def _join(forked: Sequence[_RankProcess], seconds: float | None = None) -> None:
    """Wait for all ranks to end, at most for ``seconds``."""
    deadline = None if seconds is None else time.monotonic() + seconds
    for rank in forked:
        rank.process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
