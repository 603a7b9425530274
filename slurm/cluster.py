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
import contextlib
import dataclasses
import hashlib
import json
import os
import pwd
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

_MARKER = "lockstep-cluster.json"
"""The file that makes a folder a cluster's; no other folder is ever deleted."""

_PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "scancel", "scontrol", "squeue", "srun")

_KILL_ORDER = ("slurmctld", "slurmd", "slurmstepd", "job", "srun", "munged")
"""Whoever would start or report something ends before the others."""

_HEALTHY = {"idle", "mixed", "allocated", "completing", "planned"}
"""What Slurm calls a node that works."""

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket: unix(7) gives 108 with the final zero."""

_READY_SECONDS = 30.0
"""How long nodes may take to become idle; they take about one."""

_CANCEL_SECONDS = 5.0
"""How long cancelled jobs may take to end before they are killed."""

_KILL_SECONDS = 10.0
"""How long killed processes may take to be gone."""

_SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again once its credential has expired: after 120 s, if nobody says otherwise.
AuthInfo=socket={folder}/munged/socket,cred_expire=5
StateSaveLocation={folder}/slurmctld
SlurmctldPidFile={folder}/slurmctld/pid
SlurmctldLogFile={folder}/slurmctld/log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n/pid
SlurmdLogFile={folder}/%n/log
# More CPUs and memory than the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory_per_cpu}
# A job that exceeds its memory is killed, without cgroups; pages that its ranks share count once.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,UsePss
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
# A lost node is noticed after about 15 s: the first of these and whatever the second adds.
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
"""


class ClusterError(Exception):
    """One sentence for the person who asked."""


class UsageError(ClusterError):
    """What was asked for cannot be."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a cluster pretends to be.

    Attributes:
        nodes: Number of nodes; they are called n1, n2, …
        cpus: CPUs of each node.
        gpus: GPUs of each node: scheduled and counted, but there is no device.
        memory: MB of each node; 0 means 4096 for each CPU. A job that asks for none gets its CPUs' share.
        partitions: ``NAME Key=Value …`` in Slurm's words; the first is the default one. None means debug, with all nodes.
        options: ``Key=Value`` lines of slurm.conf, which win over those written here.
    """

    nodes: int = 4
    cpus: int = 8
    gpus: int = 0
    memory: int = 0
    partitions: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("cpus", 1), ("gpus", 0), ("memory", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name}: {getattr(self, name)} must be {least} or more.")
        for option in self.options:
            if not re.match(r"\w+=", option):
                raise UsageError(f"--option: {option!r} must be Key=Value, as in slurm.conf; SlurmdTimeout=5, for example.")
        for partition in self.partitions:
            if not re.match(r"[\w.-]+( |$)", partition):
                raise UsageError(f"--partition: {partition!r} must be NAME Key=Value …; 'low PriorityTier=1', for example.")

    def __str__(self) -> str:
        return f"{self.nodes} nodes of {self.cpus} CPUs and {self.gpus} GPUs"

    @property
    def node_names(self) -> list[str]:
        """n1, n2, …"""
        return [f"n{number}" for number in range(1, self.nodes + 1)]


@dataclasses.dataclass(frozen=True)
class Process:
    """A process of a cluster.

    Attributes:
        pid: Its number.
        program: munged, slurmctld, slurmd, slurmstepd; job for whatever a job started on a node; srun for one outside.
        part: The node it is on; any other is a part of its own.
    """

    pid: int
    program: str
    part: str


class Cluster:
    """A cluster in its folder. Comes from ``up`` or ``find``; as a context manager it is taken down at the end.

    Attributes:
        folder: Everything of it: ``slurm.conf`` and, for each part, a folder with its log, sockets and state.
        shape: What it pretends to be.
        ports: Of slurmctld and of each node; empty where the folder does not say.
    """

    def __init__(self, folder: Path, shape: Shape, ports: Sequence[int] = ()) -> None:
        self.folder, self.shape, self.ports = folder.resolve(), shape, tuple(ports)

    @classmethod
    def up(
        cls,
        folder: Path,
        nodes: int = Shape.nodes,
        cpus: int = Shape.cpus,
        gpus: int = Shape.gpus,
        memory: int = Shape.memory,
        partitions: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> Self:
        """Bring a cluster up and wait until all its nodes are idle. See ``Shape`` for the arguments.

        Args:
            folder: Where it lives; made by this call, or empty.

        Raises:
            ClusterError: Slurm is missing, the folder will not do, or a daemon failed. Nothing is left behind.
        """
        shape = Shape(nodes, cpus, gpus, memory, tuple(partitions), tuple(options))
        _check_programs()
        for tries_left in (2, 1, 0):
            cluster = cls(folder, shape, _free_ports(nodes + 1))
            cluster._claim_folder()
            try:
                cluster._start()
                break
            except BaseException as error:
                # Between the choice of a port and its use, another process may have taken it.
                taken = isinstance(error, ClusterError) and cluster._lost_a_port()
                cluster.down()
                if not taken or not tries_left:
                    raise
        return cluster

    @classmethod
    def find(cls, folder: Path) -> "Cluster | None":
        """The cluster in ``folder``, whole or in pieces; None where nothing is.

        Raises:
            ClusterError: The folder is something else, or somebody else's.
        """
        cluster = cls(folder, Shape())
        if not cluster.folder.exists():
            return cluster if cluster.processes() else None
        cluster._check_folder()
        try:
            facts = json.loads((cluster.folder / _MARKER).read_text())
            shape = facts["shape"] | {key: tuple(facts["shape"][key]) for key in ("partitions", "options")}
            return cls(folder, Shape(**shape), facts["ports"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return cluster

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()

    @property
    def conf(self) -> Path:
        """slurm.conf."""
        return self.folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """What makes Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.conf)}

    @property
    def parts(self) -> list[str]:
        """munged, slurmctld, and the nodes."""
        return ["munged", "slurmctld", *self.shape.node_names]

    def command(self, *argv: str, timeout: float | None = None) -> str:
        """Run one of Slurm's commands against this cluster and return what it printed.

        Raises:
            ClusterError: It failed, with what it said, or took more than ``timeout`` seconds.
        """
        env = _scrubbed_environment() | self.env
        try:
            done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{shlex.join(argv)} did not answer within {timeout:g} s.") from None
        except OSError as error:
            raise ClusterError(f"{argv[0]} cannot be run: {error.strerror}.") from None
        if done.returncode:
            raise ClusterError(f"{shlex.join(argv)} failed ({done.returncode}): {done.stderr.strip()}")
        return done.stdout

    def node_states(self, timeout: float = 20) -> dict[str, str]:
        """The state of each node in Slurm's words, lower case: idle, allocated, down+not_responding, …"""
        shown = self.command("scontrol", "--oneliner", "show", "node", timeout=timeout)
        return {name: state.lower() for name, state in re.findall(r"^NodeName=(\S+).*? State=(\S+)", shown, re.MULTILINE)}

    def processes(self) -> list[Process]:
        """All processes of this cluster, in the order in which to kill them.

        They are recognised by what they are, never by a pid file: that may be missing, or name a process of somebody else.
        """
        found = [process for entry in os.listdir("/proc") if entry.isdigit() if (process := self._recognise(int(entry)))]
        return sorted(found, key=lambda process: _KILL_ORDER.index(process.program))

    def job_processes(self) -> list[int]:
        """What is still there of jobs on the nodes: pids of slurmstepd and of all that they started."""
        return [process.pid for process in self.processes() if process.program in ("slurmstepd", "job")]

    def dead_parts(self) -> list[str]:
        """Parts whose daemon does not run."""
        alive = {process.part for process in self.processes() if process.program in ("munged", "slurmctld", "slurmd")}
        return [part for part in self.parts if part not in alive]

    def lose(self, node: str) -> None:
        """Kill a node's daemon and all that jobs run there, without a goodbye."""
        self._check_node(node)
        self._kill(node)

    def restore(self, node: str) -> None:
        """Start the daemon of a lost node again and wait until Slurm uses it; its jobs have then been requeued or failed.

        Raises:
            ClusterError: It runs already, or failed.
        """
        self._check_node(node)
        if node not in self.dead_parts():
            raise ClusterError(f"{node} is not lost: its slurmd runs.")
        # A machine is away for longer than Slurm needs to notice: else jobs would seem to run on, on a node without them.
        if not self.node_states()[node].startswith("down"):
            self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        self._launch(node)
        self._wait_for([node], _HEALTHY)

    def down(self) -> None:
        """End every process and remove the folder, whatever is left of the cluster; a whole one cancels its jobs first.

        Raises:
            ClusterError: It was called from inside one of the cluster's own jobs, or a process cannot be killed.
        """
        self._check_not_inside()
        if not self.dead_parts():
            # In vain where a daemon hangs; all are killed in any case.
            with contextlib.suppress(ClusterError):
                self._cancel_jobs()
        self._kill()
        self._remove_folder()

    def _cancel_jobs(self) -> None:
        """Cancel all jobs and give them, and the sruns that wait for them, a moment to end."""
        jobs = self.command("squeue", "--noheader", "--format=%A", timeout=_CANCEL_SECONDS).split()
        if jobs:
            self.command("scancel", *jobs, timeout=_CANCEL_SECONDS)
            deadline = time.monotonic() + _CANCEL_SECONDS
            while {process.program for process in self.processes()} & {"slurmstepd", "job", "srun"}:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)

    def _recognise(self, pid: int) -> Process | None:
        """What a process is to this cluster; None if nothing, or if it is gone."""
        proc = Path("/proc", str(pid))
        try:
            program = os.path.basename(os.readlink(proc / "exe")).split("-")[0]  # slurmd-wlm on Debian
            if program == "munged":
                ours = os.fsencode(f"--socket={self.folder}/munged/socket") in (proc / "cmdline").read_bytes().split(b"\0")
                return Process(pid, program, program) if ours else None
            if program in ("slurmctld", "slurmd", "slurmstepd"):
                # Each daemon works in the folder of its part, and slurmstepd in that of its slurmd. Command line and
                # environment are no help: some of them overwrite both.
                folder = Path(os.readlink(proc / "cwd").removesuffix(" (deleted)"))
                return Process(pid, program, folder.name) if folder.parent == self.folder else None
            environment = dict(line.partition(b"=")[::2] for line in (proc / "environ").read_bytes().split(b"\0"))
        except OSError:
            return None
        if environment.get(b"SLURM_CONF") != os.fsencode(self.conf):
            return None
        # Only what runs on a node knows its name: the shell that salloc gives to a person does not, and is left alone.
        if b"SLURM_JOB_ID" in environment and b"SLURMD_NODENAME" in environment:
            return Process(pid, "job", os.fsdecode(environment[b"SLURMD_NODENAME"]))
        # Left alone, this one would wait for its step for ever.
        return Process(pid, program, program) if program == "srun" else None

    def _kill(self, part: str | None = None) -> None:
        """Kill all processes, or those of one part, until there are none."""
        self._check_not_inside(part)
        deadline = time.monotonic() + _KILL_SECONDS
        while found := [process for process in self.processes() if part in (None, process.part)]:
            if time.monotonic() > deadline:
                raise ClusterError(f"process {found[0].pid} ({found[0].program}) of {self.folder} cannot be killed.")
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    handle = os.pidfd_open(process.pid)
                    try:
                        # Again, now that the number cannot pass to another process.
                        if self._recognise(process.pid) == process:
                            signal.pidfd_send_signal(handle, signal.SIGKILL)
                    finally:
                        os.close(handle)
            time.sleep(0.02)

    def _check_not_inside(self, part: str | None = None) -> None:
        """Refuse to kill whoever is asking."""
        askers = set(_ancestry())
        if any(process.pid in askers and part in (None, process.part) for process in self.processes()):
            raise ClusterError(f"this is a job of the cluster in {self.folder}: call from outside of it.")

    def _check_node(self, node: str) -> None:
        if node not in self.shape.node_names:
            raise UsageError(f"{node}: the cluster in {self.folder} has only {', '.join(self.shape.node_names)}.")

    def _check_folder(self) -> None:
        """Refuse a folder that is neither a cluster's nor empty, or not this user's."""
        known = self.folder.is_dir() and ((self.folder / _MARKER).exists() or not any(self.folder.iterdir()))
        if not known or self.folder.stat().st_uid != os.geteuid():
            raise ClusterError(f"{self.folder} exists and is not a cluster's folder of yours: choose another with --folder.")

    def _claim_folder(self) -> None:
        """Make the folder, private to the user, and mark it."""
        node = self.shape.node_names[-1]
        # The longest: of the batch script of the last job id.
        room = _SOCKET_PATH_BYTES - len(f"/{node}/{node}_67043328.4294967291")
        if len(os.fsencode(self.folder)) > room:
            raise UsageError(f"{self.folder} is too long for the sockets in it: --folder may have {room} bytes.")
        if not re.fullmatch(r"[\w./+@~-]+", str(self.folder)):
            raise UsageError(f"{self.folder} will not do: --folder may have letters, digits and . / + @ ~ - _ only.")
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._check_folder()
            self.folder.chmod(0o700)
            with (self.folder / _MARKER).open("x") as marker:
                json.dump({"shape": dataclasses.asdict(self.shape), "ports": self.ports}, marker)
        except FileExistsError:
            raise ClusterError(f"{self.folder} is already there: take the cluster in it down, or choose another.") from None
        except OSError as error:
            raise ClusterError(f"{self.folder} cannot be made: {error.strerror}.") from None

    def _remove_folder(self) -> None:
        """Remove the folder, and its marker last: whatever interrupts this, it can be done again."""
        marker = self.folder / _MARKER
        if not marker.exists():
            return
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != marker:
                path.unlink()
        marker.unlink()
        self.folder.rmdir()

    def _start(self) -> None:
        for part in self.parts:
            (self.folder / part).mkdir()
        with open(os.open(self.folder / "munged" / "key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as key:
            key.write(os.urandom(128))
        gres = "AutoDetect=off\n"
        for number in range(self.shape.gpus):
            # Slurm counts only GPUs that have a device.
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
            gres += f"Name=gpu File={self.folder}/gpu{number}\n"
        (self.folder / "gres.conf").write_text(gres)
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={_cgroup_plugin()}\n")
        self.conf.write_text(_slurm_conf(self.folder, self.shape, self.ports))
        for part in self.parts:
            self._launch(part)
        self._wait_for(self.shape.node_names, {"idle"})

    def _launch(self, part: str) -> None:
        """Start the daemon of a part; it returns once it is in the background."""
        folder = self.folder / part
        if part == "munged":
            # Forced, because it dislikes a socket that other users cannot reach.
            argv = ["munged", "--force", f"--socket={folder}/socket"]
            argv += [f"--{file}-file={folder}/{file}" for file in ("key", "pid", "log", "seed")]
        else:
            argv = ["slurmctld"] if part == "slurmctld" else ["slurmd", "-N", part]
            argv += ["-f", str(self.conf)]
        # Nothing else of the caller's: a daemon lives long, and has no use for keys and tokens.
        env = {"PATH": _path()} | self.env
        started = subprocess.run(
            argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True
        )
        if started.returncode:
            raise self._failure(part, started.stderr.strip() or f"exit status {started.returncode}")

    def _wait_for(self, nodes: Sequence[str], states: set[str]) -> None:
        """Wait until each of ``nodes`` is in one of ``states``."""
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            if dead := [part for part in self.dead_parts() if part in ("munged", "slurmctld", *nodes)]:
                raise self._failure(dead[0], "it ended")
            found: dict[str, str] = {}
            with contextlib.suppress(ClusterError):
                # Slurm's commands try for 9 s to reach a slurmctld that does not listen yet.
                found = self.node_states(timeout=1)
            late = [node for node in nodes if not set(found.get(node, "unknown").split("+")) <= states]
            if not late:
                return
            if time.monotonic() > deadline:
                state = found.get(late[0], "unknown") + self._reason(late[0])
                raise ClusterError(f"{late[0]} is not ready after {_READY_SECONDS:g} s: {state}.")
            time.sleep(0.05)

    def _reason(self, node: str) -> str:
        """Why Slurm does not use a node, in its words."""
        with contextlib.suppress(ClusterError):
            shown = self.command("scontrol", "--oneliner", "show", "node", node, timeout=1)
            if reason := re.search(r" Reason=(.*) \[", shown):
                return f" ({reason[1]})"
        return ""

    def _failure(self, part: str, reason: str) -> ClusterError:
        """What went wrong with a part, with the end of its log."""
        log = self.folder / part / "log"
        tail = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
        program = part if part in ("munged", "slurmctld") else f"slurmd of {part}"
        return ClusterError("\n  ".join([f"{program} failed: {reason}" + ("; its log ends:" if tail else "."), *tail]))

    def _lost_a_port(self) -> bool:
        return any("Address already in use" in log.read_text(errors="replace") for log in self.folder.glob("*/log"))


def _slurm_conf(folder: Path, shape: Shape, ports: Sequence[int]) -> str:
    """slurm.conf: what makes it react fast on a laptop, then the options, the nodes and the partitions."""
    host = socket.gethostname().partition(".")[0]
    memory = shape.memory or 4096 * shape.cpus
    text = _SLURM_CONF.format(
        name=f"lockstep-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}",
        host=host,
        port=ports[0],
        user=_user_name(),
        folder=folder,
        memory_per_cpu=memory // shape.cpus,
    )
    if _host_is_loopback():
        text += "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"
    for option in shape.options:
        key = option.partition("=")[0]
        text = re.sub(rf"(?im)^{key}=.*\n", "", text) + f"{option}\n"
    for name, port in zip(shape.node_names, ports[1:], strict=True):
        text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={shape.cpus} RealMemory={memory}"
        text += f" Gres=gpu:{shape.gpus}\n" if shape.gpus else "\n"
    partitions = shape.partitions or ("debug",)
    for partition in partitions:
        text += f"PartitionName={partition}"
        text += "" if " nodes=" in partition.lower() else " Nodes=ALL"
        text += " Default=YES\n" if partition is partitions[0] and "default=" not in " ".join(partitions).lower() else "\n"
    return text


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ClusterError(f"user {os.geteuid()} has no name on this machine, and Slurm wants one.") from None


def _host_is_loopback() -> bool:
    """Whether the machine's name stands for 127.0.0.1: Slurm can be told to listen on the address of that name alone.

    Elsewhere it listens on all addresses, and the munge key keeps others out. 127.0.1.1, as on Debian, will not do:
    connections come from 127.0.0.1, and Slurm answers where they come from.
    """
    try:
        return socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
    except OSError:
        return False


def _cgroup_plugin() -> str:
    """One that needs no control group: slurmd loads one even if nothing uses it, and v2 looks for systemd."""
    shown = subprocess.run(["slurmd", "-V"], env={"PATH": _path()}, capture_output=True, text=True).stdout
    version = re.search(r"(\d+)\.(\d+)", shown)
    return "disabled" if version and (int(version[1]), int(version[2])) >= (23, 2) else "cgroup/v1"


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that Linux gives to connections: a lost node finds its own free again."""
    ports: list[int] = []
    for port in random.sample(range(15000, 32768), 32768 - 15000):
        with contextlib.suppress(OSError), socket.socket() as candidate:
            candidate.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError(f"there are no {count} free ports between 15000 and 32767.")


def _ancestry() -> Iterator[int]:
    """This process, its parent, and so on."""
    pid = os.getpid()
    with contextlib.suppress(FileNotFoundError):  # a parent may end meanwhile
        while pid:
            yield pid
            pid = int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])


def _path() -> str:
    """PATH, and where daemons are, which a user's own often lacks."""
    return os.pathsep.join(filter(None, [os.environ.get("PATH"), "/usr/local/sbin", "/usr/sbin"]))


def _scrubbed_environment() -> dict[str, str]:
    """This process's environment without what another cluster, or a job around us, may have left in it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SALLOC", "SRUN"))}
    return kept | {"PATH": _path()}


def _check_programs() -> None:
    missing = [program for program in _PROGRAMS if not shutil.which(program, path=_path())]
    if missing:
        raise ClusterError(
            f"Slurm is missing on this machine ({', '.join(missing)}): "
            "on Debian and Ubuntu, apt-get install slurmctld slurmd slurm-client munge."
        )


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
    ill += [
        f"{node} is {state}" for node, state in states.items() if not set(state.split("+")) <= _HEALTHY and node not in dead
    ]
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
        process = subprocess.Popen(command, env=_scrubbed_environment() | cluster.env)
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
