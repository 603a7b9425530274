"""``logs/<attempt>/failure.json``: the rank that failed first.

When one rank fails, all others fail too, with errors about lost connections. The file system decides which rank was first:
its report is recorded, and the others refer to it.
"""

import os
import platform
import secrets
import signal
import sys
import traceback
from dataclasses import dataclass, replace
from itertools import dropwhile
from pathlib import Path

from lockstep.core import SIGNAL_EXIT_STATUSES, FinalTestError, Interrupted, LockstepError, World
from lockstep.runs.records import Record, RunResult
from lockstep.runs.run import Run, describe_run, update_status

_REASON_LENGTH = 300
"""Characters of a reason; an exception of torch may name each weight."""


@dataclass(frozen=True)
class Failure(Record):
    """Why a rank failed.

    Attributes:
        node: Number of its node.
        host: Name of its machine; may be empty.
        report: One sentence, or a traceback.
        is_secondary: Whether it only lost a connection because another rank was gone.
        is_permanent: Whether another attempt would fail in the same way.
        is_killed: Whether SIGKILL from outside ended it; the cause is unknown, and it may not happen again.
        is_out_of_memory: Whether the kernel killed it because the job exceeded its memory limit.
        in_final_test: Whether user code failed in the test that follows a finished training.
    """

    rank: int
    world_size: int
    node: int
    host: str
    report: str
    exit_status: int = 1
    is_secondary: bool = False
    is_permanent: bool = False
    is_killed: bool = False
    is_out_of_memory: bool = False
    in_final_test: bool = False

    @classmethod
    def from_report(cls, report: str, world: World) -> "Failure":
        """The failure of a rank on this machine that could not report it itself."""
        return cls(world.rank, world.size, world.node_rank, host_name(), report)

    @classmethod
    def from_exception(cls, error: BaseException, world: World) -> "Failure":
        """Classify the exception that ended this rank."""
        status, report = 1, "".join(traceback.format_exception(error))
        if isinstance(error, LockstepError):
            status, report = error.exit_status, error.message
        elif isinstance(error, Interrupted):
            status = int(error.code or 1)
            report = f"it was ended by {signal_name(status)}."
        elif isinstance(error, SystemExit):
            report = f"it was ended by sys.exit({error.code!r})."
        return replace(
            cls.from_report(report, world),
            exit_status=status,
            is_secondary=world.size > 1 and is_connection_loss(error),
            is_permanent=isinstance(error, LockstepError) and error.is_permanent,
            in_final_test=isinstance(error, FinalTestError),
        )

    @property
    def is_interruption(self) -> bool:
        """Whether a signal ended the rank."""
        return self.exit_status in SIGNAL_EXIT_STATUSES

    @property
    def is_cause(self) -> bool:
        """Whether the report names the cause. A rank that lost its peers or got a signal does not know it."""
        return not self.is_secondary and not self.is_interruption

    @property
    def reason(self) -> str:
        """One line: the rank, and the whole message of its exception, shortened, or the last line of its report."""
        _, is_traceback, end = self.report.strip().rpartition("Traceback (most recent call last):\n")
        message = list(dropwhile(lambda line: line.startswith("  "), end.splitlines())) if is_traceback else []
        last = " ".join(" ".join(message or end.splitlines()[-1:]).split())
        last = last if len(last) <= _REASON_LENGTH else f"{last[:_REASON_LENGTH]}…"
        return last if self.world_size == 1 else f"rank {self.rank} {self.place}: {last}"

    @property
    def place(self) -> str:
        """Its node, and its machine where that is known."""
        return f"(node {self.node}{', ' if self.host else ''}{self.host})"


def host_name() -> str:
    """Name of this machine, as Slurm calls it where this is a job."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def signal_name(exit_status: int) -> str:
    """Name the signal behind an exit status of 128 and more."""
    return "Ctrl-C" if exit_status == 130 else signal.Signals(exit_status - 128).name


def read_first_failure(run: Run, attempt: int) -> Failure | None:
    """Return the first failure of an attempt, if a rank recorded one."""
    return Failure.read(_failure_path(run, attempt)) if attempt else None


def record_failure(run: Run, attempt: int, failure: Failure) -> Failure:
    """Record ``failure`` if it is the first of its attempt, add it to the log of rank zero, and return the first one."""
    path = _failure_path(run, attempt)
    temporary = path.with_name(f".failure.{secrets.token_hex(4)}")  # a rank and its watchdog or agent may record at once
    try:
        failure.write(temporary)
        os.link(temporary, path)  # fails where the file exists
    except FileExistsError:
        return read_first_failure(run, attempt) or failure
    except OSError as error:  # a full disk must not hide the failure
        print(f"lockstep: {path} cannot be written ({error.strerror}): {failure.report}", file=sys.stderr)
        return failure
    finally:
        temporary.unlink(missing_ok=True)
    what = "lost a peer, which left no report" if failure.is_secondary else "failed first"
    place = f"rank {failure.rank} of {failure.world_size} {failure.place} {what}.\n" if failure.world_size > 1 else ""
    line = f"lockstep: {place}{failure.report.rstrip()}"
    try:
        with run.log(attempt).open("a") as log:
            log.write(f"{line}\n")
    except OSError as error:
        print(f"lockstep: {run.log(attempt)} cannot be written ({error.strerror}). {line}", file=sys.stderr)
    return failure


def write_failed_result(run: Run, attempt: int, failure: Failure) -> None:
    """Record in ``result.json`` why an attempt failed; for a rank zero that had no time to, or does not know the cause."""
    try:
        if write_trained_result(run, attempt, failure):
            return
        earlier, result = RunResult.read(run.result), run.result_of(attempt)
        if (failure.is_interruption and result is not None) or run.is_superseded(attempt):
            return
        if run.finished_before(attempt) is not None:
            update_status(run, "finished")
            return
        status = "interrupted" if failure.is_interruption else "failed"
        command = earlier.command if earlier is not None else "fit"
        result = describe_run(run, result or RunResult(status, command, failure.world_size, attempt))
        replace(result, status=status, reason=failure.reason, exit_status=failure.exit_status).write(run.result)
        update_status(run, status)
    except OSError as error:  # a full disk must not end an agent
        print(f"lockstep: {run.result} cannot be written ({error.strerror}).", file=sys.stderr)


def write_trained_result(run: Run, attempt: int, failure: Failure) -> bool:
    """Record a final test that failed after a finished training; return False if ``failure`` is not of this kind."""
    trained = RunResult.read(run.trained_result(attempt)) if failure.in_final_test else None
    if trained is None or run.is_superseded(attempt):
        return False
    replace(trained, test_error=failure.reason).write(run.result)
    update_status(run, trained.status)
    return True


def _failure_path(run: Run, attempt: int) -> Path:
    return run.attempt_folder(attempt) / "failure.json"


def is_connection_loss(error: BaseException) -> bool:
    """Whether ``error`` comes from a collective that has lost a peer."""
    torch = sys.modules.get("torch")  # not imported yet: no collective either
    if torch is not None and isinstance(error, torch.distributed.DistError):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport", "NCCL")
    return torch is not None and isinstance(error, RuntimeError) and any(word in str(error) for word in words)
