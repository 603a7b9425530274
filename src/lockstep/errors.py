"""What a person is told when something is wrong: one sentence, and the exit status that goes with it."""


class LockstepError(Exception):
    """A condition with a known remedy; shown as one sentence, without a traceback.

    Pickles and travels out of a DataLoader worker: its only argument is the sentence.
    """

    exit_status = 1

    @property
    def sentence(self) -> str:
        """The sentence itself, also when a DataLoader worker has put its traceback around it."""
        text = str(self)
        if "Original Traceback" not in text:
            return text
        return text.rsplit(f"{type(self).__name__}: ", 1)[-1].strip()


class UsageError(LockstepError):
    """Found before training starts: a wrong key, value, file or combination. Exit status 2."""

    exit_status = 2


SIGNALLED = (130, 138, 140, 143)
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
