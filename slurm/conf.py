"""What a cluster pretends to be, and the files in Slurm's own words that make it so."""

import contextlib
import hashlib
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "scancel", "scontrol", "squeue", "srun")

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


@dataclass(frozen=True)
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


def slurm_conf(folder: Path, shape: Shape, ports: Sequence[int]) -> str:
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


def cgroup_plugin() -> str:
    """One that needs no control group: slurmd loads one even if nothing uses it, and v2 looks for systemd."""
    shown = subprocess.run(["slurmd", "-V"], env={"PATH": search_path()}, capture_output=True, text=True).stdout
    version = re.search(r"(\d+)\.(\d+)", shown)
    return "disabled" if version and (int(version[1]), int(version[2])) >= (23, 2) else "cgroup/v1"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that Linux gives to connections: a lost node finds its own free again."""
    ports: list[int] = []
    for port in random.sample(range(15000, 32768), 32768 - 15000):
        with contextlib.suppress(OSError), socket.socket() as candidate:
            candidate.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError(f"there are no {count} free ports between 15000 and 32767.")


def search_path() -> str:
    """PATH, and where daemons are, which a user's own often lacks."""
    return os.pathsep.join(filter(None, [os.environ.get("PATH"), "/usr/local/sbin", "/usr/sbin"]))


def scrubbed_environment() -> dict[str, str]:
    """This process's environment without what another cluster, or a job around us, may have left in it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SALLOC", "SRUN"))}
    return kept | {"PATH": search_path()}


def check_programs() -> None:
    missing = [program for program in _PROGRAMS if not shutil.which(program, path=search_path())]
    if missing:
        raise ClusterError(
            f"Slurm is missing on this machine ({', '.join(missing)}): "
            "on Debian and Ubuntu, apt-get install slurmctld slurmd slurm-client munge."
        )
