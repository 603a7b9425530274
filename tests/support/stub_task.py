"""A task without torch for tests of the batch script and its supervisor on a real cluster: an agent starts in half a second."""

import os
import signal
import sys
import time
from dataclasses import replace

from lockstep.runs import Run, RunResult
from lockstep.slurm import NodeTask


class StubTask(NodeTask):
    """Does in each attempt what the test tells it: the name of a file ``<attempt>-<word>`` in the run folder.

    The words are ``crash`` (the agent kills itself), ``stop`` (as at the end of the allocation) and ``finish``. SIGTERM ends it
    as it ends a training.
    """

    def __call__(self) -> None:
        run, attempt = Run(self.folder), int(os.environ["LOCKSTEP_ATTEMPT"])
        signal.signal(signal.SIGTERM, lambda *_: self._end(run, attempt, signal.SIGTERM, 143))
        (self.folder / f"{attempt}.started").write_text(os.environ["LOCKSTEP_ENDS"])
        while not (told := [path.name for path in self.folder.glob(f"{attempt}-*")]):
            time.sleep(0.05)
        match told[0].partition("-")[2]:
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                self._end(run, attempt, signal.SIGUSR2, 0)
            case "finish":
                self._end(run, attempt, None, 0)

    @staticmethod
    def _end(run: Run, attempt: int, number: signal.Signals | None, exit_status: int) -> None:
        """Write the result, and exit."""
        result = RunResult("finished", attempts=attempt)
        if number is not None:
            result = replace(result, status="interrupted", reason=number.name, exit_status=128 + number)
        result.write(run.result)
        sys.stdout.flush()
        os._exit(exit_status)
