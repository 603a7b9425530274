"""Exceptions with their exit statuses, and suggestions for misspelt names."""

import errno
from collections.abc import Iterable
from difflib import get_close_matches


class LockstepError(Exception):
    """An error with a known remedy; printed as one sentence without a traceback.

    It survives pickling, so it also comes out of DataLoader workers: its only argument is the sentence.
    """

    exit_status = 1
    is_permanent = True
    """Whether another attempt would fail in the same way."""

    def __init__(self, message: str) -> None:
        super().__init__(message)  # torch re-creates the exception of a worker with this keyword

    @property
    def message(self) -> str:
        """The sentence, without the traceback that a DataLoader worker adds."""
        text = str(self)
        if "Original Traceback" not in text:
            return text
        return text.rsplit(f"{type(self).__name__}: ", 1)[-1].strip()

    def _render_traceback_(self) -> list[str]:
        """The text that IPython and Jupyter show."""
        return [f"{type(self).__name__}: {self.message}"]


class UsageError(LockstepError):
    """An error found before training starts: a wrong key, value, file or combination. Exit status 2."""

    exit_status = 2


class RunError(LockstepError):
    """An error found while training: a damaged file, a loss that is not finite. Exit status 1."""


class SaveError(RunError):
    """A required checkpoint was not saved. Another attempt may succeed, perhaps on other nodes."""

    is_permanent = False


class StorageError(RunError):
    """A file could not be read for a reason that may pass, such as a stale NFS handle. Another attempt may succeed."""

    is_permanent = False


_MAY_PASS = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
        *(errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    }
)
"""Errors of a file system whose server is slow, restarts or was replaced, and of a node that is short of something."""


def may_pass(error: BaseException) -> bool:
    """Whether ``error`` is one of a file system that may be gone in another attempt; not that of a missing file."""
    return isinstance(error, OSError) and error.errno in _MAY_PASS


def file_error(error: OSError, message: str, otherwise: type[LockstepError] = RunError) -> LockstepError:
    """The exception to raise for ``error``: StorageError if it may pass, else ``otherwise``."""
    return (StorageError if may_pass(error) else otherwise)(message)


class PeerError(RunError):
    """Another rank or node did not answer in time. Another attempt may succeed."""

    is_permanent = False


class FinalTestError(RunError):
    """User code failed in the test after training, on some ranks; the weights are trained and saved."""


class Superseded(LockstepError):
    """A newer attempt owns the run: this one stops and writes no file that attempts share. Exit status 1."""


SIGNAL_EXIT_STATUSES = (130, 138, 140, 143)
"""Exit statuses of a run that SIGINT, SIGUSR1, SIGUSR2 or SIGTERM ended."""


class Interrupted(SystemExit):
    """A signal ended the run; the exit status is 128 plus its number."""


class Stopped(SystemExit):
    """All ranks saved a checkpoint and stopped at the same step; the run can resume. Exit status 128 + signal.

    Attributes:
        signal: Number of the signal that caused the stop; SIGUSR2 also at the end of the allocation.
        together: Whether all ranks agreed on the step; in an evaluation each rank stops by itself.
    """

    def __init__(self, signal: int, step: int, together: bool) -> None:
        super().__init__(128 + signal)
        self.signal, self.step, self.together = signal, step, together


def did_you_mean(name: str, valid: Iterable[str], rest: str = "") -> str:
    """End a sentence about the unknown ``name``: suggest the nearest valid names, or list all if they are few.

    Args:
        name: The unknown name. A dotted name is compared whole, then by its last part.
        rest: What followed ``name`` after a dot; appended to each suggestion.
    """
    valid = sorted(set(valid))
    near = get_close_matches(name, valid, n=3, cutoff=0.6)
    if not near:
        last = {candidate.rpartition(".")[2].lower(): candidate for candidate in valid}
        near = [last[match] for match in get_close_matches(name.rpartition(".")[2].lower(), last, n=3, cutoff=0.6)]
    if near:
        return f"; did you mean {' or '.join(repr(f'{match}.{rest}' if rest else match) for match in near)}?"
    if 0 < len(valid) <= 20:
        return f"; valid are {', '.join(valid)}."
    return "."
