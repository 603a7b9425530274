"""Follow the log of a job until the job ends."""

import sys
import time
from codecs import getincrementaldecoder
from collections.abc import Mapping

from lockstep.core import clear_line, shell_command
from lockstep.runs import Run
from lockstep.slurm.registry import SubmittedJob
from lockstep.slurm.status import query_status

POLL_SECONDS = 2.0
"""Time between two queries to Slurm."""


def follow(job: SubmittedJob, env: Mapping[str, str], rank: int = 0, printed: tuple[int, int] | None = None) -> int:
    """Print the log of a rank until the job ends and return its exit status; Ctrl-C stops the output, not the job.

    For a sweep, print one line whenever one of its runs changes; the exit status is that of the first that did not finish. The
    later jobs of a chain are followed in turn, until one does not finish. ``printed`` is the newest attempt, and how many bytes
    of its log have been printed already.
    """
    for place, link in enumerate(job.links):
        if place:
            print(f"job {link.job}: {link.command}", flush=True)
        if status := _follow(link, env, rank, None if place else printed):
            for later in job.links[place + 1 :] if status != 130 else ():
                print(f"job {later.job}: {later.command} does not start, because job {link.job} has not finished.", flush=True)
            return status
    return 0


def _follow(job: SubmittedJob, env: Mapping[str, str], rank: int, printed: tuple[int, int] | None) -> int:
    logs = [_RankLog(job.members[0][1], rank, *(printed or (0, 0)))] if job.runs == 1 else []
    shown: dict[str, tuple[str, str]] = {}
    asked = time.monotonic() if printed else 0.0  # the caller has just queried Slurm
    try:
        while True:
            for log in logs:
                log.print_news()
            if time.monotonic() - asked < POLL_SECONDS:
                time.sleep(0.2)
                continue
            statuses = query_status([job], env)
            asked = time.monotonic()
            for status in statuses:
                if shown.get(status.job) != (status.state, status.message):
                    shown[status.job] = status.state, status.message
                    print(f"job {status.job}: {status.state}. {status.message}".rstrip(), flush=True)
            if not any(status.is_active for status in statuses):
                for log in logs:
                    log.print_news()
                return next((status.exit_status for status in statuses if status.exit_status), 0)
    except KeyboardInterrupt:
        command = ("logs", "-f") if job.runs == 1 else ("status",)
        clear_line(sys.stdout)  # the terminal shows ^C there
        print(f"job {job.job} continues; to follow it: {shell_command('jobs', *command, job.job)}", flush=True)
        return 130


class _RankLog:
    """The growing log of a rank, attempt after attempt, from byte ``read`` of the log of ``attempt``."""

    def __init__(self, run: Run, rank: int, attempt: int, read: int) -> None:
        self._run, self._rank, self._attempt, self._read = run, rank, attempt, read
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")  # keeps a character that is not written whole yet

    def print_news(self) -> None:
        """Print what was written since the last call."""
        for attempt in range(max(1, self._attempt), self._run.newest_attempt + 1):
            if attempt != self._attempt:
                self._attempt, self._read = attempt, 0
                self._decoder.reset()
            if (path := self._run.find_log(attempt, self._rank)) is not None:
                with path.open("rb") as file:
                    file.seek(self._read)
                    new = file.read()
                self._read += len(new)
                print(self._decoder.decode(new), end="", flush=True)
