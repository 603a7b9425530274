"""A Slurm cluster on one machine, for laptops, CI and development: munged, slurmctld and one slurmd per simulated node.

A cluster lives in one folder and uses loopback addresses and free ports, so several clusters and another Slurm on the machine
do not interfere. CPUs, GPUs and memory of a node are what you request; together they may exceed those of the machine.

    eval "$({program} up --nodes 4)"   start a cluster; Slurm's commands in this shell use it
    {program} status                   print nodes, daemons, partitions and jobs
    {program} lose n2                  kill node n2 without a shutdown; `restore n2` starts it again
    {program} down                     stop the cluster and remove its folder
    {program} run -- squeue            start a cluster, run one command against it, stop it

With --accounting it has a database, slurmdbd and an account; with --cgroups the kernel limits the memory of jobs.
Any user may run it; jobs run as that user. It needs Slurm's programs and munge (`make slurm`).
"""

import argparse
import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lockstep.core import count
from lockstep.slurm.cluster import (
    DAEMONS,
    HEALTHY,
    Cluster,
    ClusterError,
    ClusterSpec,
    ClusterUsageError,
    binds_cpus,
    scrubbed_environment,
)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _start(folder: Path, requested: Mapping[str, Any]) -> tuple[Cluster, bool]:
    """Return the cluster in ``folder``, started if there is none, and whether this call started it.

    Raises:
        ClusterError: A cluster is there, but some of its daemons are dead, or it differs from what was requested.
    """
    cluster = Cluster.find(folder)
    if cluster is None:
        start = time.monotonic()
        cluster = Cluster.up(folder, **requested)
        _log(f"{cluster.spec} are up in {cluster.folder} after {time.monotonic() - start:.1f} s.")
        if cluster.spec.cgroups and not binds_cpus(cluster.spec):
            cpus = count(cluster.spec.cpus, "CPU")
            _log(f"--cgroups limits memory, but binds no CPUs: a node has {cpus}, and this machine only {os.cpu_count()}.")
        return cluster, True
    if dead := cluster.dead_parts():
        raise ClusterError(f"the cluster in {cluster.folder} has dead daemons ({', '.join(dead)}); run `down` first.")
    for key, value in requested.items():
        if (now := getattr(cluster.spec, key)) != value:
            raise ClusterError(f"the cluster in {cluster.folder} has {key} {now}, not {value}; run `down` first.")
    _log(f"{cluster.spec} are already up in {cluster.folder}.")
    return cluster, False


def _status(cluster: Cluster) -> int:
    """Print the state of the cluster; return 0 if all daemons and nodes work."""
    dead = cluster.dead_parts()
    pids = {process.part: process.pid for process in cluster.processes() if process.program in DAEMONS}
    answers = not {"munged", "slurmctld"} & set(dead)
    states = cluster.node_states() if answers else {}
    lines = [f"{cluster.spec} in {cluster.folder}"]
    for part in cluster.parts:
        daemon = f"pid {pids[part]}" if part in pids else "dead"
        port = f"port {cluster.port(part)}" if cluster.port(part) else ""
        lines.append(f"{part:10} {daemon:10} {port:10} {states.get(part, '')}".rstrip())
    if answers:
        partitions = re.findall(r"PartitionName=(\S+)", cluster.command("scontrol", "-o", "show", "partition"))
        jobs = cluster.command("squeue", "--noheader").splitlines()
        lines += [f"partitions {' '.join(partitions)}", f"jobs       {len(jobs)}"]
    print("\n".join([*lines, f"SLURM_CONF={cluster.conf}"]))
    broken = [node for node, state in states.items() if not set(state.split("+")) <= HEALTHY and node not in dead]
    problems = [*(f"{part} is dead" for part in dead), *(f"{node} is {states[node]}" for node in broken)]
    if problems:
        _log(f"{', '.join(problems)}.")
    return 1 if problems else 0


def _run(cluster: Cluster, command: Sequence[str]) -> int:
    """Run a command against the cluster; return its exit status, or 128 plus the number of the signal that killed it."""
    process: subprocess.Popen[bytes] | None = None
    pending: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            return  # a terminal sends Ctrl-C to the command too
        if process is None:
            pending.append(number)
        else:
            process.send_signal(number)

    # Before the command starts, so that a signal during its start reaches it.
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    try:
        process = subprocess.Popen(command, env=scrubbed_environment() | cluster.env)
    except OSError as error:
        _log(f"{command[0]} cannot be run: {error.strerror}.")
        return 127
    for early in pending:
        process.send_signal(early)
    status = process.wait()
    return status if status >= 0 else 128 - status


def _log(message: str) -> None:
    print(f"cluster: {message}", file=sys.stderr)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=(__doc__ or "").format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    location = argparse.ArgumentParser(add_help=False)
    default = Path("/tmp", f"lockstep-slurm-{os.geteuid()}")
    location.add_argument(
        "--folder", type=Path, default=default, help="folder of the cluster, a short path (default: %(default)s)"
    )
    # Suppressed: a value that is not requested may differ in a cluster that is already up.
    spec = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for name, help in (
        ("nodes", f"simulated nodes, called n1, n2, … (default: {ClusterSpec.nodes})"),
        ("cpus", f"CPUs per node; may exceed those of the machine (default: {ClusterSpec.cpus})"),
        ("gpus", f"GPUs per node: Slurm schedules them, but no device exists (default: {ClusterSpec.gpus})"),
        ("memory", "memory per node in MB (default: 4096 per CPU)"),
    ):
        spec.add_argument(f"--{name}", type=int, metavar="N", help=help)
    for name, metavar, help in (
        (
            "partition",
            "NAME Key=Value …",
            "a partition as in slurm.conf; the first is the default (default: debug, with all nodes)",
        ),
        ("option", "Key=Value", "a line of slurm.conf, which overrides this script's own"),
    ):
        spec.add_argument(f"--{name}", dest=f"{name}s", action="append", metavar=f"'{metavar}'", help=f"{help}; repeatable")
    spec.add_argument(
        "--accounting",
        action="store_true",
        help="record jobs with slurmdbd, in a database of the cluster: sacct and sacctmgr work",
    )
    spec.add_argument(
        "--cgroups",
        action="store_true",
        help="let the kernel limit the memory of jobs, and bind them to CPUs if a node has no more than the machine (root)",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("up", parents=[location, spec], help="start a cluster; prints the export line for the shell")
    actions.add_parser("status", parents=[location], help="print the state of the cluster; exit status 1 if anything is dead")
    down = actions.add_parser("down", parents=[location], help="cancel the jobs, stop all daemons, remove the folder")
    down.add_argument("--yes", action="store_true", help="do not ask before jobs are cancelled")
    usage = f"{program} run [options] -- COMMAND …"
    actions.add_parser("run", parents=[location, spec], usage=usage, help="start a cluster, run a command against it, stop it")
    for action, help in (("lose", "kill a node without a shutdown"), ("restore", "start a killed node again")):
        actions.add_parser(action, parents=[location], help=help).add_argument("node", metavar="NODE")
    return parser


def main(argv: Sequence[str], program: str = "lockstep cluster") -> int:
    """Run the action of the command line and return the exit status."""
    # As exceptions, so that an interrupted `up` or `run` cleans up.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit)
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = vars(_parser(program).parse_args(argv[:end]))
    arguments |= {key: tuple(arguments[key]) for key in ("partitions", "options") if key in arguments}
    try:
        return _act(**arguments, command=argv[end + 1 :])
    except ClusterError as error:
        _log(str(error))
        return 2 if isinstance(error, ClusterUsageError) else 1
    except KeyboardInterrupt:
        return 130


def _may_cancel(cluster: Cluster) -> bool:
    """Name the jobs that have not ended, and ask before they are cancelled; without a terminal, refuse only those of others."""
    try:
        lines = cluster.command("squeue", "--noheader", "--format=%i %u %j", timeout=10).splitlines()
    except ClusterError:  # the controller is dead, and no job can be cancelled
        return True
    jobs = [line.split(maxsplit=2) for line in lines]
    if not jobs:
        return True
    shown = ", ".join(f"{id_} ({name} of {user})" for id_, user, name in jobs[:5])
    _log(f"{count(len(jobs), 'job')} will be cancelled: {shown}{', …' if len(jobs) > 5 else ''}.")
    if sys.stdin.isatty():
        print("cluster: stop the cluster? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    if {user for _, user, _ in jobs} - {pwd.getpwuid(os.geteuid()).pw_name}:
        raise ClusterUsageError("jobs of other users run; use --yes to cancel them.")
    return True


def _act(action: str, folder: Path, command: Sequence[str], node: str = "", yes: bool = False, **requested: Any) -> int:
    if (action == "run") != bool(command):
        raise ClusterUsageError("run needs a COMMAND after --." if action == "run" else f"{action} takes no command.")
    if action in ("up", "run"):
        cluster, started = _start(folder, requested)
        if action == "up":
            print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
            return 0
        try:
            return _run(cluster, command)
        finally:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            if started:
                cluster.down()
    found = Cluster.find(folder)
    if found is None:
        _log(f"no cluster is up in {folder}.")
        return 0 if action == "down" else 1
    if action == "status":
        return _status(found)
    if action == "down":
        if not yes and not _may_cancel(found):
            return 1
        found.down()
        _log(f"the cluster in {found.folder} is down.")
    elif action == "lose":
        found.lose(node)
    else:
        found.restore(node)
    return 0


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
