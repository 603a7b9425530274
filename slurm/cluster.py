#!/usr/bin/env python3
"""A real Slurm cluster on one machine: munged, slurmctld and one slurmd for each pretend node.

Made for laptops, CI and developing against, not for real work. Several stand side by side, each in a folder of its own, on
loopback addresses and free ports, and none reads or touches another Slurm of the machine. Nodes have as many CPUs and GPUs
and as much memory as they are told, so one machine may be promised several times over.

    eval "$(python slurm/cluster.py up --nodes 4)"   bring it up; Slurm's commands in this shell now talk to it
    python slurm/cluster.py status                   nodes, daemons, partitions, jobs
    python slurm/cluster.py lose n2                  kill a node without a goodbye; `restore n2` brings it back
    python slurm/cluster.py down                     leave nothing behind
    python slurm/cluster.py run -- make test-slurm   one command against it, brought up and taken down around that

Standard library only: it runs before the project is installed. Any user may run it; jobs run as that user.
"""

import argparse
import os
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

from conf import ClusterError, Shape, UsageError, scrubbed_environment
from daemons import HEALTHY, Cluster

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _bring_up(folder: Path, asked: Mapping[str, Any]) -> tuple[Cluster, bool]:
    """The cluster in ``folder``, and whether it was brought up just now.

    Raises:
        ClusterError: One is there, but in pieces or of another shape than what was asked for.
    """
    cluster = Cluster.find(folder)
    if cluster is None:
        start = time.monotonic()
        cluster = Cluster.up(folder, **asked)
        _say(f"{cluster.shape} are up in {cluster.folder} after {time.monotonic() - start:.1f} s.")
        return cluster, True
    if dead := cluster.dead_parts():
        raise ClusterError(f"the cluster in {cluster.folder} is partly dead ({', '.join(dead)}): take it `down` first.")
    for key, value in asked.items():
        if (now := getattr(cluster.shape, key)) != value:
            raise ClusterError(f"the cluster in {cluster.folder} has {key} {now}, not {value}: take it `down` first.")
    _say(f"{cluster.shape} are already up in {cluster.folder}.")
    return cluster, False


def _status(cluster: Cluster) -> int:
    """Print how the cluster is; 0 if all is well."""
    dead = cluster.dead_parts()
    pids = {
        process.part: process.pid for process in cluster.processes() if process.program in ("munged", "slurmctld", "slurmd")
    }
    ports = dict(zip(cluster.parts[1:], cluster.ports, strict=False))
    answers = not {"munged", "slurmctld"} & set(dead)
    states = cluster.node_states() if answers else {}
    lines = [f"{cluster.shape} in {cluster.folder}"]
    for part in cluster.parts:
        daemon, port = f"pid {pids[part]}" if part in pids else "dead", f"port {ports[part]}" if part in ports else ""
        lines.append(f"{part:10} {daemon:10} {port:10} {states.get(part, '')}".rstrip())
    if answers:
        partitions = re.findall(r"PartitionName=(\S+)", cluster.command("scontrol", "-o", "show", "partition"))
        jobs = cluster.command("squeue", "--noheader").splitlines()
        lines += [f"partitions {' '.join(partitions)}", f"jobs       {len(jobs)}"]
    print("\n".join([*lines, f"SLURM_CONF={cluster.conf}"]))
    ill = [f"{part} is dead" for part in dead]
    ill += [f"{node} is {state}" for node, state in states.items() if not set(state.split("+")) <= HEALTHY and node not in dead]
    if ill:
        _say(f"{', '.join(ill)}.")
    return 1 if ill else 0


def _run(cluster: Cluster, command: Sequence[str]) -> int:
    """Run a command against the cluster; its exit status, or 128 and the number of the signal that ended it."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            return  # a terminal sends Ctrl-C to the command by itself
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    # Before the command starts: it must not be left alone by a signal that comes right then.
    for ending in _ENDINGS:
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, pass_on)
    try:
        process = subprocess.Popen(command, env=scrubbed_environment() | cluster.env)
    except OSError as error:
        _say(f"{command[0]} cannot be run: {error.strerror}.")
        return 127
    for number in early:
        process.send_signal(number)
    status = process.wait()
    return status if status >= 0 else 128 - status


def _say(words: str) -> None:
    print(f"cluster: {words}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cluster.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    place = argparse.ArgumentParser(add_help=False)
    default = Path("/tmp", f"lockstep-slurm-{os.geteuid()}")
    place.add_argument("--folder", type=Path, default=default, help="where it lives; a short path (default: %(default)s)")
    # Suppressed: whatever is not asked for may be as it is in a cluster that is already up.
    shape = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for name, help in (
        ("nodes", f"pretend nodes, n1, n2, … (default: {Shape.nodes})"),
        ("cpus", f"CPUs of each node; may exceed the machine's (default: {Shape.cpus})"),
        ("gpus", f"GPUs of each node: scheduled and counted, but there is no device (default: {Shape.gpus})"),
        ("memory", "MB of each node (default: 4096 for each CPU)"),
    ):
        shape.add_argument(f"--{name}", type=int, metavar="N", help=help)
    for name, metavar, help in (
        ("partition", "NAME Key=Value …", "a partition as in slurm.conf; the first is the default one (default: debug)"),
        ("option", "Key=Value", "a line of slurm.conf, which wins over this script's own"),
    ):
        shape.add_argument(f"--{name}", dest=f"{name}s", action="append", metavar=f"'{metavar}'", help=f"{help}; repeatable")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("up", parents=[place, shape], help="bring it up; prints the export line for the shell")
    actions.add_parser("status", parents=[place], help="what is up; exit status 1 if something is dead")
    actions.add_parser("down", parents=[place], help="cancel its jobs, end its processes, remove its folder")
    usage = "cluster.py run [options] -- COMMAND …"
    actions.add_parser("run", parents=[place, shape], usage=usage, help="run a command against it")
    for action, help in (("lose", "kill a node without a goodbye"), ("restore", "bring a lost node back")):
        actions.add_parser(action, parents=[place], help=help).add_argument("node", metavar="NODE")
    return parser


def main(argv: Sequence[str]) -> int:
    """Do what ``argv`` says and return the exit status."""
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = vars(_parser().parse_args(argv[:cut]))
    arguments |= {key: tuple(arguments[key]) for key in ("partitions", "options") if key in arguments}
    try:
        return _act(**arguments, command=argv[cut + 1 :])
    except ClusterError as error:
        _say(str(error))
        return 2 if isinstance(error, UsageError) else 1


def _act(action: str, folder: Path, command: Sequence[str], node: str = "", **asked: Any) -> int:
    if (action == "run") != bool(command):
        raise UsageError("run needs a COMMAND after --." if action == "run" else f"{action} takes no command.")
    if action in ("up", "run"):
        cluster, new = _bring_up(folder, asked)
        if action == "up":
            print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
            return 0
        try:
            return _run(cluster, command)
        finally:
            for number in _ENDINGS:
                signal.signal(number, signal.SIG_IGN)
            if new:
                cluster.down()
    there = Cluster.find(folder)
    if there is None:
        _say(f"no cluster is up in {folder}.")
        return 0 if action == "down" else 1
    if action == "status":
        return _status(there)
    if action == "down":
        there.down()
        _say(f"nothing is left in {there.folder}.")
    elif action == "lose":
        there.lose(node)
    else:
        there.restore(node)
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    # So that an interrupted `up` or `run` cleans up behind itself.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is signal.SIG_DFL:
            signal.signal(ending, _leave)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
