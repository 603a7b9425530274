"""Several ranks on one machine: forked from a process that has already imported everything, named when they fail.

Used by ``launch/local.py`` and by the tests. Importing torch and lightning takes longer than many a test; a fork takes none
of that time again. Nothing here may start CUDA before the fork.
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
"""How long a rank that is asked to end may take."""


class RankFailed(Exception):
    """A rank failed; the others were ended.

    Attributes:
        world: The rank that failed first.
        report: Its traceback, or the one sentence of a ``LockstepError``, or how it was killed.
        exit_status: What the launcher exits with: 2 for a wrong usage, else 1.
        sentence: Whether ``report`` is a sentence that needs no more words.
    """

    def __init__(self, world: World, report: str, exit_status: int = 1, sentence: bool = False) -> None:
        super().__init__(f"rank {world.rank} of {world.size} (node {world.node_rank}) failed: {report}")
        self.world, self.report, self.exit_status, self.message = world, report, exit_status, sentence


@dataclass(frozen=True)
class _RankFailure:
    time: float
    report: str
    exit_status: int
    message: bool


def fork_ranks(
    target: Callable[[World], T], nodes: int = 1, ranks: int = 1, logs: Callable[[int], Path] | None = None
) -> list[T]:
    """Run ``target(world)`` in ``nodes`` × ``ranks`` forked processes and return what each returned, by rank.

    Args:
        target: What a rank does; its result must pickle.
        nodes: Pretend nodes.
        ranks: Ranks on each of them.
        logs: Where the output of a rank goes, for every rank but zero; None leaves it where the caller's goes.

    Raises:
        RankFailed: Names the rank that failed first. The others have been ended.
        KeyboardInterrupt: Ctrl-C; all ranks have been ended.
    """
    size = nodes * ranks
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
        worlds = [World(rank, size, rank % ranks, ranks, f"file://{folder}/rendezvous", "local") for rank in range(size)]
        receivers: list[Connection] = []
        sys.stdout.flush()
        sys.stderr.flush()
        processes: list[BaseProcess] = []
        endings: list[int] = []
        before = signal.signal(signal.SIGTERM, _raise_interrupted)
        try:
            for world in worlds:
                # One after the other, or a rank would hold the ends of the pipes of those after it, and nobody could tell
                # that they are gone.
                receiver, sender = context.Pipe(duplex=False)
                receivers.append(receiver)
                log = logs(world.rank) if logs is not None and world.rank else None
                process = context.Process(target=_run_rank, args=(target, world, sender, log, os.getpid()))
                process.start()
                processes.append(process)
                # Not Process.sentinel: it is a pipe, and a DataLoader worker of a dead rank still holds its other end.
                linux = sys.platform == "linux"
                endings.append(os.pidfd_open(process.pid or 0) if linux else os.dup(process.sentinel))
                sender.close()
            return _collect(worlds, processes, receivers, endings)
        except (KeyboardInterrupt, Interrupted):
            # A terminal sends Ctrl-C to the ranks as well: let them stop together, and save. A second one ends that.
            _wait(processes)
            for rank in processes:
                if rank.is_alive():
                    rank.terminate()
            for rank in processes:
                rank.join()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            _terminate(processes)
            for ending in endings:
                os.close(ending)


def _raise_interrupted(*_: object) -> None:
    raise Interrupted(143)


def _run_rank(target: Callable[[World], Any], world: World, sender: Connection, log: Path | None, parent: int) -> None:
    """The life of a forked rank."""
    _exit_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        # Both layers: the parent may have put something else than file descriptor 1 behind sys.stdout.
        sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    os.environ.update(world.environ())
    if (shared := _visible_devices(world, os.environ.get("CUDA_VISIBLE_DEVICES"))) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = shared
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
        sender.send(_RankFailure(time.time(), f"It was ended by {name}; --resume goes on.", status, True))
    except BaseException as error:
        if log is not None:
            traceback.print_exc()
        sender.send(_RankFailure(time.time(), "".join(traceback.format_exception(error)), 1, False))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: what the parent registered to run at its exit is not this process's business.
        os._exit(status)


def _exit_with_parent(parent: int) -> None:
    """Ask Linux to end this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _visible_devices(world: World, visible: str | None) -> str | None:
    """The GPUs of this rank's pretend node, for CUDA_VISIBLE_DEVICES; None leaves it as it is, on one node or without GPUs."""
    import torch

    count = torch.cuda.device_count()
    if world.nodes == 1 or count == 0:
        return None
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    first = world.node_rank * world.local_size
    return ",".join(names[first : first + world.local_size]) if world.size <= count else ""


def _collect(
    worlds: Sequence[World], processes: Sequence[BaseProcess], receivers: Sequence[Connection], endings: Sequence[int]
) -> list[Any]:
    """The results of all ranks, or the first failure."""
    results: dict[int, Any] = {}
    failures: dict[int, _RankFailure] = {}
    waiting = {world.rank for world in worlds}
    deadline: float | None = None
    while waiting and (deadline is None or time.time() < deadline):
        heard = [item for rank in waiting for item in (receivers[rank], endings[rank])]
        ready = wait(heard, timeout=None if deadline is None else max(0.0, deadline - time.time()))
        for rank in sorted(waiting):
            if receivers[rank] not in ready and endings[rank] not in ready:
                continue
            waiting.remove(rank)
            message = _receive(receivers[rank], processes[rank])
            if isinstance(message, _RankFailure):
                failures[rank] = message
                # Its peers fail with it, some of them sooner to tell: hear them before the first is named. Those that stop
                # together have things to close.
                if message.exit_status < 128:
                    deadline = deadline or time.time() + 0.3
            else:
                results[rank] = message
    if failures:
        rank, first = min(failures.items(), key=lambda item: item[1].time)
        raise RankFailed(worlds[rank], first.report, first.exit_status, first.message)
    return [results[world.rank] for world in worlds]


def _receive(receiver: Connection, process: BaseProcess) -> Any:
    """What a rank has returned, or how it failed; a little earlier than now if it died without a word."""
    try:
        if receiver.poll():
            return receiver.recv()
    except EOFError:
        pass
    process.join(1)
    return _RankFailure(time.time() - 0.2, _describe_exit(process.exitcode), 1, False)


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"it was killed by {signal.Signals(-code).name}."
    return f"it ended without a word, with exit status {code}."


def _terminate(processes: Sequence[BaseProcess]) -> None:
    """End all that still run: ask, wait a moment, then kill."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    _wait(processes)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Give all that still run a moment to end by themselves."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
