#!/usr/bin/env python
"""What became of the jobs that launch/slurm.py has submitted.

    python launch/jobs.py list                         all of them, on this cluster
    python launch/jobs.py status [JOB] [--json]        state, reason, step, speed, time left, metrics
    python launch/jobs.py logs [JOB] [--rank N] [--tail N] [-f]
    python launch/jobs.py cancel JOB

JOB is what launch/slurm.py printed, one run of a sweep (12_3), or a run folder; without it, the last one submitted.

exit status of status and logs -f:
    0 finished · 1 failed · 2 wrong usage, of this command or of the run · 3 waits or runs · 4 cancelled ·
    5 over its time limit · 6 out of memory · 7 a node failed · 130, 143 interrupted
of a sweep, that of the first run that did not finish
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

from lockstep.core import CommandLineParser, LockstepError, UsageError, int_at_least
from lockstep.runs import RunProgress, read_attempts
from lockstep.slurm import (
    RunStatus,
    SubmittedJob,
    check_slurm_conf,
    find_job,
    follow,
    mark_cancelled,
    query_status,
    registered_jobs,
)

Row = dict[str, str]


def main(arguments: Sequence[str]) -> int:
    """Do what ``arguments`` say and return the exit status."""
    parser = CommandLineParser(prog="launch/jobs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="all jobs")
    status = commands.add_parser("status", help="what became of a job")
    for command in (listing, status):
        command.add_argument("--json", action="store_true", help="for scripts")
    logs = commands.add_parser("logs", help="what a rank has printed")
    logs.add_argument("--rank", type=int_at_least(0), default=0, help="which rank (default 0)")
    logs.add_argument("--tail", type=int_at_least(0), metavar="N", help="only the last N lines")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the job ends; Ctrl-C stops the following alone")
    cancel = commands.add_parser("cancel", help="end a job")
    for command in (status, logs):
        command.add_argument("job", nargs="?", metavar="JOB")
    cancel.add_argument("job", metavar="JOB")
    try:
        own = parser.parse_args(arguments)
        check_slurm_conf(os.environ)
        if own.command == "list":
            return show_all(registered_jobs(os.environ), own.json)
        queued = find_job(own.job, os.environ)
        if own.command == "status":
            return show(queued, own.json)
        if own.command == "logs":
            return show_log(queued, own.rank, own.tail, own.follow)
        return end(queued)
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def show_all(jobs: Sequence[SubmittedJob], as_json: bool) -> int:
    """One line for each job; a sweep is one job."""
    views = query_status(jobs, os.environ)
    if as_json:
        print(json.dumps([view.as_dict() for view in views], indent=2, ensure_ascii=False))
        return 0
    rows = []
    for job in jobs:
        own, views = views[: job.runs], views[job.runs :]
        states = [view.state for view in own]
        state = states[0] if job.runs == 1 else ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.time))
        rows.append({"job": job.job, "submitted": when, "name": job.name, "state": state, "folder": str(job.folder)})
    print_table(rows)
    return 0


def show(queued: SubmittedJob, as_json: bool) -> int:
    """Everything about one job."""
    views = query_status([queued], os.environ)
    if as_json:
        told = [view.as_dict() for view in views]
        print(json.dumps(told if queued.runs > 1 else told[0], indent=2, ensure_ascii=False))
    elif queued.runs > 1:
        print_table([sweep_row(view) for view in views])
        print(f"\nsweep {queued.folder}")
    else:
        print_facts(views[0])
    return next((view.exit_status for view in views if view.exit_status), 0)


def sweep_row(view: RunStatus) -> Row:
    """One run of a sweep: its values, where it is, its results."""
    values = (view.sweep or {}).get("values", {})
    scores = {name: f"{value:.4g}" for name, value in view.metrics.items() if name.endswith(("loss", "accuracy"))}
    return {"job": view.job, **values, "state": view.state, "step": steps(view), **scores}


def steps(view: RunStatus) -> str:
    """Step of steps."""
    result, progress = view.result, view.progress
    step = result.global_step if result is not None else progress.step if progress is not None else None
    total = progress.steps if progress is not None else None
    return "" if step is None else f"{step}/{total}" if total else str(step)


def print_facts(view: RunStatus) -> None:
    """One fact a line."""
    progress, slurm = view.progress or RunProgress(""), view.slurm
    left = progress.seconds_left
    lost = view.result.seconds.lost if view.result is not None and view.result.seconds is not None else 0
    attempts = [attempt for attempt in read_attempts(view.run)[-5:] if attempt.reason]
    facts = {
        "job": view.job,
        "state": view.state,
        "why": view.message,
        "nodes": slurm.nodes if slurm else "",
        "time": f"{slurm.elapsed} of {slurm.limit}" if slurm else "",
        "attempt": str(view.attempt or ""),
        **{f"attempt {a.attempt}": f"ended at step {a.step}: {a.reason}" for a in attempts},
        "warning": progress.warning if view.is_active else "",
        "lost": f"{lost:.0f} s" if lost else "",
        "step": steps(view),
        "speed": f"{progress.samples_per_second:g} samples/s" if progress.samples_per_second else "",
        "time left": f"{left:.0f} s" if left and view.is_active else "",
        **{name: f"{value:.5g}" for name, value in sorted(view.metrics.items()) if not name.startswith("rate/")},
        "folder": str(view.run.folder),
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if value:
            print(f"{name:{width}}  {value}")


def print_table(rows: Sequence[Row]) -> None:
    """A table on a terminal, plain lines with tabs in a pipe; columns in the order of their appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(" ".join(row.get(name, "").split()) for name in columns))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(Text(row.get(name, "")) for name in columns))
    Console().print(table)


def show_log(queued: SubmittedJob, rank: int, tail: int | None, following: bool) -> int:
    """Print the log of a rank in the newest attempt; what came before its first line, where it has none.

    Raises:
        UsageError: There is no such log, or a sweep's run is not named.
    """
    if queued.runs > 1:
        raise UsageError(f"{queued.job} is a sweep of {queued.runs} runs; name one, such as {queued.job}_0.")
    if following and tail is None:
        return follow(queued, os.environ, rank)
    view = query_status([queued], os.environ)[0]
    path = view.run.folder / "logs" / str(view.attempt) / f"{rank}.log"
    if not path.exists():
        early = queued.folder / "slurm" / f"{view.job}_{rank}_log.out"
        if not early.exists():
            raise UsageError(f"job {view.job} ({view.state}) has no log of rank {rank} yet. {view.message}".rstrip())
        path = early
    with path.open(errors="replace") as file:
        sys.stdout.writelines(file if tail is None else deque(file, tail))
    sys.stdout.flush()
    return follow(queued, os.environ, rank, view) if following else 0


def end(queued: SubmittedJob) -> int:
    """Have Slurm cancel a job.

    Raises:
        UsageError: Slurm would not.
    """
    views = query_status([queued], os.environ)
    if not any(view.is_active for view in views):
        raise UsageError(f"job {queued.job} is over already: {views[0].state}.")
    done = subprocess.run(["scancel", queued.job], capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"Slurm does not cancel {queued.job}: {done.stderr.strip()}")
    mark_cancelled(views)
    print(f"job {queued.job} is cancelled", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
