"""Run numbered pieces of work in processes that end with this one."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from lockstep.core import LockstepError, RunError

_RETRY = "run the command again: finished shards are kept."

T = TypeVar("T")

Work = Callable[[int, Callable[[int], None]], T]
"""One piece of work: its number, and what to call after each sample, with the bytes that it takes."""


@dataclass
class Totals:
    """Samples and bytes so far, of all processes."""

    samples: int = 0
    bytes: int = 0
    pieces: int = 0


@dataclass
class Workers:
    """Runs work in ``count`` processes; with 0, in this process.

    Args:
        show: Called several times a second with the work done.
    """

    count: int
    show: Callable[[Totals], None]

    def run(self, work: Work[T], numbers: Sequence[int]) -> dict[int, T]:
        """The results of ``work`` for each of ``numbers``.

        Raises:
            LockstepError: What a piece has raised.
            RunError: A process has failed otherwise, or was killed.
        """
        if not self.count:
            return self._run_here(work, numbers)
        context: Any = multiprocessing.get_context("fork")
        counts = context.Array(ctypes.c_int64, 2 * self.count, lock=False)
        arguments = work, numbers, context.Value(ctypes.c_int64, 0), counts, os.getpid()
        processes: list[BaseProcess] = []
        receivers: list[Connection] = []
        sys.stdout.flush()
        try:
            for slot in range(min(self.count, len(numbers))):
                receiver, sender = context.Pipe(duplex=False)
                receivers.append(receiver)
                process = context.Process(target=_work_in_process, args=(*arguments, sender, 2 * slot), daemon=True)
                process.start()
                processes.append(process)
                sender.close()  # before the next fork: a pipe ends with its process, also in the middle of a result
            return self._collect(processes, receivers, counts, len(numbers))
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()
            for receiver in receivers:
                receiver.close()

    def _collect(self, processes: list[BaseProcess], receivers: list[Connection], counts: Any, pieces: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        while len(found) < pieces:
            statuses = [process.exitcode for process in processes]
            while ready := wait(receivers, timeout=0):
                for receiver in ready:
                    assert isinstance(receiver, Connection)
                    try:
                        number, result, error = receiver.recv()
                    except (EOFError, OSError):  # OSError: killed in the middle of a result
                        receivers.remove(receiver)
                        receiver.close()
                        continue
                    if error is not None:
                        raise error
                    found[number] = result
            failed = next(filter(None, statuses), None)
            if (failed or None not in statuses) and len(found) < pieces:  # a dataset may exit with status 0
                raise RunError(f"A worker ended with {_describe_exit(failed or 0)}; {_RETRY}")
            self.show(Totals(sum(counts[::2]), sum(counts[1::2]), len(found)))
            time.sleep(0.05)
        return found

    def _run_here(self, work: Work[T], numbers: Sequence[int]) -> dict[int, T]:
        totals, found = Totals(), dict[int, T]()

        def packed(size: int) -> None:
            totals.samples += 1
            totals.bytes += size
            self.show(totals)

        for number in numbers:
            found[number] = work(number, packed)
            totals.pieces += 1
        return found


def _work_in_process(
    work: Work[T], numbers: Sequence[int], next_position: Any, counts: Any, parent: int, results: Connection, slot: int
) -> None:
    """Take numbers until none is left; send results, or the first error, to ``results``."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives this call and disturbs the next
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the terminal: the parent terminates this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)

    def packed(size: int) -> None:
        counts[slot] += 1
        counts[slot + 1] += size

    while True:
        with next_position.get_lock():
            position = next_position.value
            next_position.value += 1
        if position >= len(numbers):
            return
        try:
            results.send((numbers[position], work(numbers[position], packed), None))
        except LockstepError as error:
            results.send((numbers[position], None, error))
        except OSError as error:
            results.send((numbers[position], None, RunError(f"A shard cannot be written ({error.strerror}); {_RETRY}")))
        except Exception:
            traceback.print_exc()
            os._exit(1)


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    hint = ", perhaps out of memory: use fewer --workers" if status == -signal.SIGKILL else ""
    return f"{signal.Signals(-status).name}{hint}"
