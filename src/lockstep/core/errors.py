"""The nearest valid names to a misspelt one."""

from collections.abc import Iterable
from difflib import get_close_matches


class LockstepError(Exception):
    """A condition with a known remedy; shown as one sentence, without a traceback.

    Pickles and travels out of a DataLoader worker: its only argument is the sentence.
    """

    exit_status = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)  # torch raises it again, out of a worker, by the keyword

    @property
    def message(self) -> str:
        """The sentence itself, also when a DataLoader worker has put its traceback around it."""
        text = str(self)
        if "Original Traceback" not in text:
            return text
        return text.rsplit(f"{type(self).__name__}: ", 1)[-1].strip()


class UsageError(LockstepError):
    """Found before training starts: a wrong key, value, file or combination. Exit status 2."""

    exit_status = 2


SIGNAL_EXIT_STATUSES = (130, 138, 140, 143)
"""Exit statuses of a run that SIGINT, SIGUSR1, SIGUSR2 or SIGTERM has ended."""


class Interrupted(SystemExit):
    """A signal ended the run: exit status 130 after Ctrl-C, 143 after SIGTERM."""


class Stopped(SystemExit):
    """All ranks have stopped after the same step and saved it; the run can go on. Exit status 128 and the signal's number.

    Attributes:
        signal: Why; SIGUSR2 also for the end of the allocation.
        step: Optimizer steps done.
        together: Whether all ranks have agreed on it; in an evaluation each leaves by itself.
    """

    def __init__(self, signal: int, step: int, together: bool) -> None:
        super().__init__(128 + signal)
        self.signal, self.step, self.together = signal, step, together


class RunError(LockstepError):
    """Found while training: a damaged file, a loss that is not a number. Exit status 1."""


def did_you_mean(name: str, valid: Iterable[str], rest: str = "") -> str:
    """The end of a sentence about an unknown ``name``: the nearest valid ones, or all where there are few.

    Args:
        name: What was written. A dotted name is compared whole, then by its last part.
        valid: What could have been meant.
        rest: What followed ``name`` after a dot, repeated after each suggestion.
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
