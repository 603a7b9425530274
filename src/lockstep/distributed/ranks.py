"""Several ranks on one machine, forked from a process that has already imported torch and Lightning.

``launch/local.py`` and the tests use it: importing takes longer than many tests, and forking takes no time. CUDA must not be
initialized before the fork.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from lockstep.core import Interrupted, LockstepError, World

T = TypeVar("T")

_GRACE_SECONDS = 3.0
"""How long a rank may take to end after SIGTERM."""


class RankFailed(Exception):
    """A rank failed, and the other ranks were ended.

    Attributes:
        world: The rank that failed first.
        report: Its traceback, the message of its ``LockstepError``, or the signal that killed it.
        exit_status: Exit status for the launcher: 2 for a usage error, 128 and the number of a stop signal, else 1.
        is_sentence: Whether ``report`` is a complete sentence for the user.
    """

    def __init__(self, world: World, report: str, exit_status: int = 1, is_sentence: bool = False) -> None:
        super().__init__(f"rank {world.rank} of {world.size} (node {world.node_rank}) failed: {report}")
        self.world, self.report, self.exit_status, self.is_sentence = world, report, exit_status, is_sentence


@dataclass(frozen=True)
class _RankFailure:
    """Sent by a rank that fails; the fields of ``RankFailed``, and when it failed (seconds since 1970)."""

    time: float
    report: str
    exit_status: int = 1
    is_sentence: bool = False


@dataclass(frozen=True)
class _RankProcess:
    """A forked rank: its process, the pipe for its result, and a descriptor that becomes readable when it ends."""

    world: World
    process: BaseProcess
    receiver: Connection
    end: int


def fork_ranks(
    target: Callable[[World], T], nodes: int = 1, ranks: int = 1, logs: Callable[[int], Path] | None = None
) -> list[T]:
    """Run ``target(world)`` in ``nodes`` × ``ranks`` forked processes and return the results by rank.

    Args:
        target: The function of a rank; its result must pickle.
        nodes: Number of simulated nodes.
        ranks: Ranks on each node.
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
                forked.append(_fork(target, world, logs(rank) if logs is not None and rank else None))
            return _collect(forked)
        except (KeyboardInterrupt, Interrupted):
            # A terminal sends Ctrl-C to the ranks too: let them save and stop together. A second Ctrl-C ends the wait.
            _join(forked)
            for rank_process in forked:
                if rank_process.process.is_alive():
                    rank_process.process.terminate()
            for rank_process in forked:
                rank_process.process.join()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
            _end(forked)
            for rank_process in forked:
                os.close(rank_process.end)


def _raise_interrupted(*_: object) -> None:
    raise Interrupted(143)


def _fork(target: Callable[[World], Any], world: World, log: Path | None) -> _RankProcess:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_rank, args=(target, world, sender, log, os.getpid()))
    process.start()
    # Before the next fork: a later rank must not hold the sending end, or the pipe would not close when this rank ends.
    sender.close()
    # Process.sentinel is a pipe too, and a DataLoader worker of a dead rank still holds its other end.
    end = os.pidfd_open(process.pid or 0) if sys.platform == "linux" else os.dup(process.sentinel)
    return _RankProcess(world, process, receiver, end)


def _run_rank(target: Callable[[World], Any], world: World, sender: Connection, log: Path | None, parent: int) -> None:
    """Run ``target`` in a forked process, send its result or failure, and exit."""
    _exit_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        # Python's streams too: in the parent, sys.stdout may be something other than file descriptor 1.
        sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    os.environ.update(world.environ())
    if (devices := _visible_devices(world, os.environ.get("CUDA_VISIBLE_DEVICES"))) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    status = 1
    try:
        sender.send(target(world))
        status = 0
    except LockstepError as error:
        status = error.exit_status
        sender.send(_RankFailure(time.time(), error.message, status, True))
    except Interrupted as error:
        status = int(error.code) if isinstance(error.code, int) else 1
        name = "Ctrl-C" if status == 130 else signal.Signals(status - 128).name
        sender.send(_RankFailure(time.time(), f"{name} ended the run; continue it with --resume.", status, True))
    except BaseException as error:
        if log is not None:
            traceback.print_exc()
        sender.send(_RankFailure(time.time(), "".join(traceback.format_exception(error))))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without the exit handlers of the parent


def _exit_with_parent(parent: int) -> None:
    """Make Linux kill this process when its parent ends, even after SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _visible_devices(world: World, visible: str | None) -> str | None:
    """CUDA_VISIBLE_DEVICES for the GPUs of this rank's simulated node; None to keep it, on one node or without GPUs."""
    import torch

    count = torch.cuda.device_count()
    if world.nodes == 1 or count == 0:
        return None
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    first = world.node_rank * world.local_size
    return ",".join(names[first : first + world.local_size]) if world.size <= count else ""


def _collect(forked: Sequence[_RankProcess]) -> list[Any]:
    """The results of all ranks, by rank.

    Raises:
        RankFailed: At least one rank failed; names the first.
    """
    results: dict[int, Any] = {}
    failures: dict[int, _RankFailure] = {}
    running = set(range(len(forked)))
    deadline: float | None = None
    while running and (deadline is None or time.time() < deadline):
        handles = [handle for rank in running for handle in (forked[rank].receiver, forked[rank].end)]
        ready = wait(handles, timeout=None if deadline is None else max(0.0, deadline - time.time()))
        for rank in sorted(running):
            if forked[rank].receiver not in ready and forked[rank].end not in ready:
                continue
            running.remove(rank)
            message = _receive(forked[rank])
            if not isinstance(message, _RankFailure):
                results[rank] = message
                continue
            failures[rank] = message
            # Its peers fail too, and may report sooner: wait for them before naming the first. After a stop signal the
            # ranks still have work to finish, so there is no deadline.
            if message.exit_status < 128:
                deadline = deadline or time.time() + 0.3
    if failures:
        rank, first = min(failures.items(), key=lambda item: item[1].time)
        raise RankFailed(forked[rank].world, first.report, first.exit_status, first.is_sentence)
    return [results[rank] for rank in range(len(forked))]


def _receive(rank: _RankProcess) -> Any:
    """The result of a rank, or its failure."""
    try:
        if rank.receiver.poll():
            return rank.receiver.recv()
    except EOFError:
        pass
    rank.process.join(1)
    code = rank.process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with status {code}"
    # A killed rank fails before its peers notice, and sends nothing: date it back.
    return _RankFailure(time.time() - 0.2, f"The process {how}.")


def _end(forked: Sequence[_RankProcess]) -> None:
    """End all ranks that still run: SIGTERM, then SIGKILL after the grace time."""
    for rank in forked:
        if rank.process.is_alive():
            rank.process.terminate()
    _join(forked)
    for rank in forked:
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()


def _join(forked: Sequence[_RankProcess]) -> None:
    """Wait for all ranks to end, for the grace time at most."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank in forked:
        rank.process.join(max(0.0, deadline - time.monotonic()))
