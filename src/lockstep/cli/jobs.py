"""Show, follow and cancel the jobs that lockstep has submitted.

    {program} list [--all] [--json]        the 20 newest jobs on this cluster, or all
    {program} status [JOB] [--json]        state, reason, step, speed, time left, metrics
    {program} logs [JOB] [--rank N] [--tail N] [-f]
    {program} cancel JOB

JOB is the id that the submission printed, one run of a sweep (12_3), a run id or a run folder; by default the newest job.
In a chain, JOB includes the jobs that follow it, so that the first job means all; `logs` prints the log of JOB alone.

exit status of status and logs -f:
    0 finished · 1 failed · 2 usage error, of this command or of the run · 3 waiting or running · 4 cancelled ·
    5 over its time limit · 6 out of memory · 7 a node failed · 130, 138, 140, 143 interrupted
For a sweep: the status of its first run that did not finish.
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
from lockstep.runs import LaunchRecord, RunProgress, read_attempts
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

SHOWN = 20
"""Number of jobs that ``list`` shows; each takes a dozen reads."""


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands and their arguments to ``parser``."""
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    listing = commands.add_parser("list", help="the newest jobs")
    listing.add_argument("--all", action="store_true", help=f"all jobs, not only the {SHOWN} newest")
    status = commands.add_parser("status", help="state and progress of a job")
    for command in (listing, status):
        command.add_argument("--json", action="store_true", help="print JSON")
    logs = commands.add_parser(
        "logs", help="log of a rank; without JOB, of the newest job, or in a chain of the last that started"
    )
    logs.add_argument("--rank", type=int_at_least(0), default=0, help="which rank (default 0)")
    logs.add_argument("--tail", type=int_at_least(0), metavar="N", help="only the last N lines")
    logs.add_argument(
        "-f", "--follow", action="store_true", help="follow the log until the job ends; Ctrl-C does not end the job"
    )
    cancel = commands.add_parser("cancel", help="cancel a job")
    for command in (status, logs):
        command.add_argument("job", nargs="?", metavar="JOB")
    cancel.add_argument("job", metavar="JOB")


def main(arguments: Sequence[str], program: str = "lockstep jobs") -> int:
    """Run the command in ``arguments`` and return the exit status."""
    parser = CommandLineParser(
        prog=program,
        description=(__doc__ or "").format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_commands(parser)
    try:
        options = parser.parse_args(arguments)
        check_slurm_conf(os.environ)
        if options.command == "list":
            return show_all(registered_jobs(os.environ, None if options.all else SHOWN), options.json)
        job = find_job(options.job, os.environ)
        if options.command == "status":
            return show(job, options.json)
        if options.command == "logs":
            if options.job is None and not options.follow:
                job = newest_link(job)
            return show_log(job, options.rank, options.tail, options.follow)
        return cancel_job(job)
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def show_all(jobs: Sequence[SubmittedJob], as_json: bool) -> int:
    """Print one line per job; a sweep is one job, and so is a chain."""
    statuses = query_status(jobs, os.environ)
    if as_json:
        print(json.dumps([status.as_dict() for status in statuses], indent=2, ensure_ascii=False))
        return 0
    rows = []
    for job in jobs:
        parts = []
        for link in job.links:
            states, statuses = [status.state for status in statuses[: link.runs]], statuses[link.runs :]
            many = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
            parts.append(f"{link.command} " * bool(job.then) + (states[0] if link.runs == 1 else many))
        state = "; ".join(parts)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.time))
        rows.append({"job": job.job, "submitted": when, "name": job.name, "state": state, "folder": str(job.folder)})
    print_table(rows)
    return 0


def show(job: SubmittedJob, as_json: bool) -> int:
    """Print everything about one job and those that follow it."""
    statuses = query_status([job], os.environ)
    if as_json:
        records = [status.as_dict() for status in statuses]
        print(json.dumps(records if len(records) > 1 else records[0], indent=2, ensure_ascii=False))
    elif job.runs > 1:
        print_table([({"command": status.command} if job.then else {}) | sweep_row(status) for status in statuses])
        print("", *(f"sweep {link.folder}" for link in job.links), sep="\n")
    else:
        for place, status in enumerate(statuses):
            if place:
                print()
            print_facts(status, len(statuses) > 1 or status.command != "fit")
    return next((status.exit_status for status in statuses if status.exit_status), 0)


def sweep_row(status: RunStatus) -> Row:
    """One run of a sweep: its values, state, step and scores."""
    values = status.sweep.values if status.sweep is not None else {}
    scores = {name: f"{value:.4g}" for name, value in status.metrics.items() if name.endswith(("loss", "accuracy"))}
    return {"job": status.job, **values, "state": status.state, "step": format_steps(status), **scores}


def format_steps(status: RunStatus) -> str:
    """The step, and the number of all steps if it is known."""
    result, progress = status.result, status.progress
    step = result.global_step if result is not None else progress.step if progress is not None else None
    total = progress.steps if progress is not None else None
    return "" if step is None else f"{step}/{total}" if total else str(step)


def print_facts(status: RunStatus, with_command: bool) -> None:
    """Print one fact per line."""
    progress, slurm = status.progress or RunProgress(""), status.slurm
    left = progress.seconds_left
    lost = status.result.seconds.lost if status.result is not None and status.result.seconds is not None else 0
    attempts = [attempt for attempt in read_attempts(status.run)[-5:] if attempt.reason]
    facts = {
        "job": status.job,
        "command": status.command if with_command else "",
        "state": status.state,
        "why": status.message,
        "nodes": slurm.nodes if slurm else "",
        "time": f"{slurm.elapsed} of {slurm.limit}" if slurm else "",
        "attempt": str(status.attempt or ""),
        "phase": progress.phase if status.is_active and progress.status == "starting" else "",
        **{f"attempt {a.attempt}": f"ended at step {a.step}: {a.reason}" for a in attempts},
        "warning": progress.warning if status.is_active else "",
        "lost": f"{lost:.0f} s" if lost else "",
        "step": format_steps(status),
        "epoch": str(progress.epoch + 1) if status.is_active and progress.status == "training" else "",
        "speed": f"{progress.samples_per_second:g} samples/s" if progress.samples_per_second else "",
        "time left": f"{left:.0f} s" if left and status.is_active else "",
        **{name: f"{value:.5g}" for name, value in sorted(status.metrics.items()) if not name.startswith(("rate/", "epoch"))},
        "weights": (status.result and status.result.weights) or "",
        "folder": str(status.run.folder),
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if value:
            print(f"{name:{width}}  {value}")


def print_table(rows: Sequence[Row]) -> None:
    """Print a table on a terminal, else tab-separated lines; columns are in the order of their appearance."""
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


def newest_link(job: SubmittedJob) -> SubmittedJob:
    """The last job that started, among a job and those that follow it."""
    return next((link for link in reversed(job.links) if any(run.newest_attempt for _, run in link.members)), job)


def show_log(job: SubmittedJob, rank: int, tail: int | None, following: bool) -> int:
    """Print the log of a rank in the newest attempt, or the output of srun if the rank has none yet.

    Raises:
        UsageError: The log does not exist, or JOB is a sweep.
    """
    if job.runs > 1:
        raise UsageError(f"{job.job} is a sweep of {job.runs} runs; give one of them, such as {job.job}_0.")
    if following and tail is None:
        return follow(job, os.environ, rank)
    status = query_status([job], os.environ)[0]
    path = log = status.run.find_log(status.attempt, rank)
    if path is None:
        launch = LaunchRecord.read(status.run.launch)
        if launch is not None and rank >= (ranks := launch.max_nodes * launch.ranks_per_node):
            raise UsageError(f"--rank: {rank} does not exist; the ranks of job {status.job} are 0 to {ranks - 1}.")
        node = rank // launch.ranks_per_node if launch is not None else 0
        early = job.folder / "slurm" / f"{status.job}_{node}_log.out"  # of the agent
        if not early.exists():
            raise UsageError(f"job {status.job} ({status.state}) has no log of rank {rank} yet. {status.message}".rstrip())
        path = early
    with path.open("rb") as file:
        sys.stdout.writelines(line.decode(errors="replace") for line in (file if tail is None else deque(file, tail)))
        printed = file.tell() if log is not None else 0  # not the size, which may grow meanwhile
    sys.stdout.flush()
    return follow(job, os.environ, rank, (status.attempt, printed)) if following else 0


def cancel_job(job: SubmittedJob) -> int:
    """Cancel a job and those that follow it.

    Raises:
        UsageError: The job is over, or Slurm does not cancel it.
    """
    statuses = query_status([job], os.environ)
    if not any(status.is_active for status in statuses):
        raise UsageError(f"job {job.job} has ended already: {statuses[0].state}.")
    active = {status.job for status in statuses if status.is_active}
    jobs = [link.job for link in job.links if active & {name for name, _ in link.members}]
    done = subprocess.run(["scancel", *reversed(jobs)], capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"job {job.job}: scancel failed ({done.stderr.strip()})")
    mark_cancelled(statuses)
    print(f"job {jobs[0]} is cancelled" if len(jobs) == 1 else f"jobs {', '.join(jobs)} are cancelled", file=sys.stderr)
    return 0
