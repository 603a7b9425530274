"""A job's log as it grows, and what becomes of the job. No torch here."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from lockstep.slurm.registry import SubmittedJob
from lockstep.slurm.status import RunStatus, query_status

POLL_SECONDS = 2.0
"""Time between two questions to Slurm."""


def follow(queued: SubmittedJob, env: Mapping[str, str], rank: int = 0, seen: RunStatus | None = None) -> int:
    """Print a rank's log until the job ends and return its exit status; Ctrl-C stops the following, never the job.

    For a sweep, one line whenever one of its runs changes; the exit status is that of the first that did not finish.

    Args:
        queued: The job.
        env: Environment for Slurm's commands.
        rank: Whose log.
        seen: What was known just now, with a log that has been shown already.
    """
    logs = _RankLog(queued, rank, seen.attempt if seen else 0) if queued.runs == 1 else None
    said: dict[str, tuple[str, str]] = {}
    asked = time.monotonic() if seen else 0.0
    try:
        while True:
            if logs is not None:
                for text in logs.news():
                    print(text, end="", flush=True)
            if time.monotonic() - asked < POLL_SECONDS:
                time.sleep(0.2)
                continue
            views = query_status([queued], env)
            asked = time.monotonic()
            for view in views:
                if said.get(view.job) != (view.state, view.message):
                    said[view.job] = view.state, view.message
                    print(f"job {view.job}: {view.state}. {view.message}".rstrip(), flush=True)
            if not any(view.alive for view in views):
                if logs is not None:
                    for text in logs.news():
                        print(text, end="", flush=True)
                return next((view.exit_status for view in views if view.exit_status), 0)
    except KeyboardInterrupt:
        again = f"logs -f {queued.job} follows it again" if queued.runs == 1 else f"status {queued.job} shows it"
        print(f"\njob {queued.job} goes on; jobs.py {again}.", flush=True)
        return 130


class _RankLog:
    """A rank's log as it grows, attempt after attempt.

    Args:
        queued: The job.
        rank: Whose log.
        shown: Number of the attempt whose log has been shown already; 0 for none.
    """

    def __init__(self, queued: SubmittedJob, rank: int, shown: int) -> None:
        self._run, self._rank = queued.members[0][1], rank
        self._attempt = shown
        self._read = path.stat().st_size if (path := self._path(shown)).exists() else 0

    def _path(self, attempt: int) -> Path:
        return self._run.folder / "logs" / str(attempt) / f"{self._rank}.log"

    def news(self) -> Iterator[str]:
        """What was written since the last call."""
        newest = self._run.newest_attempt
        for attempt in range(max(1, self._attempt), newest + 1):
            if attempt != self._attempt:
                self._attempt, self._read = attempt, 0
            path = self._path(attempt)
            if path.exists():
                with path.open(errors="replace", newline="") as file:
                    file.seek(self._read)
                    text = file.read()
                    self._read = file.tell()
                if text:
                    yield text
