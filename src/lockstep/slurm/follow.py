"""Follow the log of a job until the job ends."""

import time
from collections.abc import Iterator, Mapping

from lockstep.slurm.registry import SubmittedJob
from lockstep.slurm.status import RunStatus, query_status

POLL_SECONDS = 2.0
"""Time between two queries to Slurm."""


def follow(job: SubmittedJob, env: Mapping[str, str], rank: int = 0, seen: RunStatus | None = None) -> int:
    """Print the log of a rank until the job ends and return its exit status; Ctrl-C ends the following, not the job.

    For a sweep, print one line whenever one of its runs changes; the exit status is that of the first that did not finish.

    Args:
        job: The job.
        env: Environment for Slurm's commands.
        rank: Whose log.
        seen: A status of just now, whose log was printed already.
    """
    log = _RankLog(job, rank, seen.attempt if seen else 0) if job.runs == 1 else None
    printed: dict[str, tuple[str, str]] = {}
    asked = time.monotonic() if seen else 0.0
    try:
        while True:
            _print_news(log)
            if time.monotonic() - asked < POLL_SECONDS:
                time.sleep(0.2)
                continue
            statuses = query_status([job], env)
            asked = time.monotonic()
            for status in statuses:
                if printed.get(status.job) != (status.state, status.message):
                    printed[status.job] = status.state, status.message
                    print(f"job {status.job}: {status.state}. {status.message}".rstrip(), flush=True)
            if not any(status.is_active for status in statuses):
                _print_news(log)
                return next((status.exit_status for status in statuses if status.exit_status), 0)
    except KeyboardInterrupt:
        command = f"logs -f {job.job}" if job.runs == 1 else f"status {job.job}"
        print(f"\njob {job.job} continues; to follow it: jobs.py {command}", flush=True)
        return 130


def _print_news(log: "_RankLog | None") -> None:
    for text in log.news() if log is not None else ():
        print(text, end="", flush=True)


class _RankLog:
    """The log of a rank while it grows, attempt after attempt.

    Args:
        job: The job.
        rank: Whose log.
        printed: Number of the attempt whose log was printed already; 0 for none.
    """

    def __init__(self, job: SubmittedJob, rank: int, printed: int) -> None:
        self._logs, self._rank = job.members[0][1].folder / "logs", rank
        self._run = job.members[0][1]
        path = self._logs / str(printed) / f"{rank}.log"
        self._attempt, self._read = printed, path.stat().st_size if path.exists() else 0

    def news(self) -> Iterator[str]:
        """What was written since the last call."""
        for attempt in range(max(1, self._attempt), self._run.newest_attempt + 1):
            if attempt != self._attempt:
                self._attempt, self._read = attempt, 0
            path = self._logs / str(attempt) / f"{self._rank}.log"
            if path.exists():
                with path.open(errors="replace", newline="") as file:
                    file.seek(self._read)
                    text = file.read()
                    self._read = file.tell()
                if text:
                    yield text
