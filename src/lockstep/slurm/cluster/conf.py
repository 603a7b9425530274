"""The specification of a cluster, its slurm.conf, and the programs, ports and environment of its daemons."""

import contextlib
import hashlib
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.core import count

_PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "scancel", "scontrol", "squeue", "srun")
_ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "sacct", "sacctmgr")

_EPOCH = 1767225600
"""The start of 2026, in seconds since 1970."""

_SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again when its credential has expired; the default is 120 s.
AuthInfo=socket={folder}/munged/socket,cred_expire=5
StateSaveLocation={folder}/slurmctld
# No id of an earlier cluster: a run that its job 1 has finished would look finished to the job 1 that resumes it.
FirstJobId={first_job}
SlurmctldPidFile={folder}/slurmctld/pid
SlurmctldLogFile={folder}/slurmctld/log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n/pid
SlurmdLogFile={folder}/%n/log
# Allow more CPUs and memory than the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory_per_cpu}
# Kill a job that exceeds its memory, without cgroups; pages that its ranks share count once.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,UsePss
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
# Slurm notices a lost node after about 15 s, the sum of these two.
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
"""

_ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
# The socket of munge, not a password.
AccountingStoragePass={folder}/munged/socket
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
"""


class ClusterError(Exception):
    """An error with a remedy, shown as one sentence."""


class ClusterUsageError(ClusterError):
    """An argument that is not valid."""


@dataclass(frozen=True)
class ClusterSpec:
    """Nodes, resources and configuration of a cluster.

    Attributes:
        nodes: Number of nodes; they are called n1, n2, …
        cpus: CPUs per node.
        gpus: GPUs per node: Slurm schedules them, but no device exists.
        memory: Memory per node in MB; 0 means 4096 per CPU. By default a job gets the share of its CPUs.
        partitions: ``NAME Key=Value …`` as in slurm.conf; the first is the default. Empty means debug, with all nodes.
        options: ``Key=Value`` lines of slurm.conf, which override the ones here.
        accounting: Whether slurmdbd records jobs, in a database of the cluster.
        cgroups: Whether the kernel limits the memory of jobs, and binds tasks to CPUs if a node has no more than the machine.
    """

    nodes: int = 4
    cpus: int = 8
    gpus: int = 0
    memory: int = 0
    partitions: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    accounting: bool = False
    cgroups: bool = False

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("cpus", 1), ("gpus", 0), ("memory", 0)):
            if getattr(self, name) < least:
                raise ClusterUsageError(f"--{name}: {getattr(self, name)} must be {least} or more.")
        for option in self.options:
            if not re.match(r"\w+=", option):
                raise ClusterUsageError(f"--option: {option!r} must be Key=Value, as in slurm.conf, such as SlurmdTimeout=5.")
        for partition in self.partitions:
            if not re.match(r"[\w.-]+( |$)", partition):
                raise ClusterUsageError(f"--partition: {partition!r} must be NAME Key=Value …, such as 'low PriorityTier=1'.")

    def __str__(self) -> str:
        return f"{count(self.nodes, 'node')} of {count(self.cpus, 'CPU')} and {count(self.gpus, 'GPU')}"

    @property
    def node_names(self) -> list[str]:
        """n1, n2, …"""
        return [f"n{number}" for number in range(1, self.nodes + 1)]


def cluster_name(folder: Path) -> str:
    """The name of the cluster in a folder, as Slurm knows it."""
    return f"lockstep-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"


def slurm_conf(folder: Path, spec: ClusterSpec, ports: Sequence[int], values: Mapping[str, str]) -> str:
    """Return slurm.conf for ``spec``, with short timeouts; ``ports`` as in ``Cluster``, ``values`` override the ones here."""
    host = socket.gethostname().partition(".")[0]
    memory = spec.memory or 4096 * spec.cpus
    text = _SLURM_CONF.format(
        name=cluster_name(folder),
        host=host,
        port=ports[0],
        user=user_name(),
        folder=folder,
        memory_per_cpu=memory // spec.cpus,
        first_job=1 + int(time.time() - _EPOCH) % 60_000_000,  # the largest id is 67,043,328
    )
    if host_is_loopback():
        text += "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"
    if spec.accounting:
        text += _ACCOUNTING.format(folder=folder, port=ports[-1])
    for option in (*map("=".join, values.items()), *spec.options):
        key = option.partition("=")[0]
        text = re.sub(rf"(?im)^{key}=.*\n", "", text) + f"{option}\n"
    for name, port in zip(spec.node_names, ports[1 : spec.nodes + 1], strict=True):
        text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={spec.cpus} RealMemory={memory}"
        text += f" Gres=gpu:{spec.gpus}\n" if spec.gpus else "\n"
    partitions = spec.partitions or ("debug",)
    for partition in partitions:
        text += f"PartitionName={partition}"
        text += "" if " nodes=" in partition.lower() else " Nodes=ALL"
        text += " Default=YES\n" if partition is partitions[0] and "default=" not in " ".join(partitions).lower() else "\n"
    return text


def user_name() -> str:
    """Name of the user that the daemons and jobs run as."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ClusterError(f"user {os.geteuid()} has no name on this machine, but Slurm needs one.") from None


def host_is_loopback() -> bool:
    """Whether the machine's name resolves to 127.0.0.1, so that Slurm can listen on the address of that name only.

    Otherwise it listens on all addresses, and the munge key rejects others. 127.0.1.1, as on Debian, does not work: connections
    come from 127.0.0.1, and Slurm answers to their source.
    """
    try:
        return socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
    except OSError:
        return False


def cgroup_plugin() -> str:
    """Return the cgroup plugin that needs no cgroups: slurmd always loads one, and v2 requires systemd."""
    shown = subprocess.run(["slurmd", "-V"], env={"PATH": search_path()}, capture_output=True, text=True).stdout
    version = re.search(r"(\d+)\.(\d+)", shown)
    return "disabled" if version and (int(version[1]), int(version[2])) >= (23, 2) else "cgroup/v1"


def free_ports(count: int) -> list[int]:
    """Return unused ports below the ephemeral range of Linux, so that a restarted daemon finds its port unused."""
    ports: list[int] = []
    for port in random.sample(range(15000, 32768), 32768 - 15000):
        with contextlib.suppress(OSError), socket.socket() as candidate:
            candidate.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError(f"found only {len(ports)} of {count} free ports between 15000 and 32767.")


def search_path() -> str:
    """PATH with the folders of daemons, which a user's PATH often lacks."""
    return os.pathsep.join(filter(None, [os.environ.get("PATH"), "/usr/local/sbin", "/usr/sbin"]))


def scrubbed_environment() -> dict[str, str]:
    """The environment without the variables of another cluster or an enclosing job."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SALLOC", "SRUN"))}
    return kept | {"PATH": search_path()}


def check_programs(accounting: bool = False) -> None:
    """Raise ClusterError if Slurm or munge is not installed, or what accounting needs."""
    programs = (*_PROGRAMS, *(_ACCOUNTING_PROGRAMS if accounting else ()))
    missing = [program for program in programs if not shutil.which(program, path=search_path())]
    if missing and set(missing) <= set(_ACCOUNTING_PROGRAMS):
        raise ClusterError(
            f"--accounting: {', '.join(missing)} is missing on this machine; "
            "on Debian and Ubuntu: apt-get install slurmdbd mariadb-server-core."
        )
    if missing:
        raise ClusterError(
            f"Slurm is missing on this machine ({', '.join(missing)}); "
            "on Debian and Ubuntu: apt-get install slurmctld slurmd slurm-client munge."
        )
