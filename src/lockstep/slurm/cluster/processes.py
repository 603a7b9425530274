"""Find the processes of a cluster by their program and folder, as pid files may be missing or stale, and kill them."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep.slurm.cluster.conf import ClusterError

DAEMONS = ("slurmctld", "slurmd", "slurmdbd", "mariadbd", "munged")
"""The programs of the parts of a cluster."""

_KILL_ORDER = ("slurmctld", "slurmd", "slurmstepd", "job", "srun", "slurmdbd", "mariadbd", "munged")
"""First those that start other processes, or that would report the end of others."""

_KILL_SECONDS = 10.0
"""How long killed processes may take to disappear."""


@dataclass(frozen=True)
class Process:
    """A process of a cluster.

    Attributes:
        pid: Process id.
        program: One of DAEMONS, or slurmstepd; job for a process that a job started on a node; srun for one outside.
        part: The node that it runs on; outside of nodes the name of its folder, or its program.
    """

    pid: int
    program: str
    part: str


def processes(folder: Path) -> list[Process]:
    """Return all processes of the cluster in ``folder``, in the order in which to kill them."""
    found = [process for entry in os.listdir("/proc") if entry.isdigit() if (process := _identify(int(entry), folder))]
    return sorted(found, key=lambda process: _KILL_ORDER.index(process.program))


def _identify(pid: int, folder: Path) -> Process | None:
    """Return the process ``pid`` if it belongs to the cluster in ``folder``; None if it does not, or has ended."""
    proc = Path("/proc", str(pid))
    try:
        program = os.path.basename(os.readlink(proc / "exe")).split("-")[0]  # slurmd-wlm on Debian
        if program in ("munged", "mariadbd"):
            part = program.replace("mariadbd", "mariadb")
            ours = os.fsencode(f"--socket={folder}/{part}/socket") in (proc / "cmdline").read_bytes().split(b"\0")
            return Process(pid, program, part) if ours else None
        if program in ("slurmctld", "slurmd", "slurmdbd", "slurmstepd"):
            # The current folder of a daemon is that of its part, and slurmstepd inherits that of slurmd. Some of them
            # overwrite their command line and environment.
            cwd = Path(os.readlink(proc / "cwd").removesuffix(" (deleted)"))
            return Process(pid, program, cwd.name) if cwd.parent == folder else None
        environment = dict(line.partition(b"=")[::2] for line in (proc / "environ").read_bytes().split(b"\0"))
    except OSError:
        return None
    if environment.get(b"SLURM_CONF") != os.fsencode(folder / "slurm.conf"):
        return None
    # Only processes on a node have SLURMD_NODENAME. The shell that salloc starts for a person does not, and survives.
    if b"SLURM_JOB_ID" in environment and b"SLURMD_NODENAME" in environment:
        return Process(pid, "job", os.fsdecode(environment[b"SLURMD_NODENAME"]))
    # An srun outside of nodes would wait for its step forever.
    return Process(pid, program, program) if program == "srun" else None


def kill(folder: Path, part: str | None = None) -> None:
    """Kill all processes of the cluster in ``folder``, or of one part, and wait until they have ended.

    Raises:
        ClusterError: The caller is a job of the cluster, or a process cannot be killed.
    """
    check_not_inside(folder, part)
    deadline = time.monotonic() + _KILL_SECONDS
    while found := [process for process in processes(folder) if part in (None, process.part)]:
        if time.monotonic() > deadline:
            raise ClusterError(f"process {found[0].pid} ({found[0].program}) of {folder} cannot be killed.")
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(process.pid)
                try:
                    # Check again: from here on the pid cannot pass to another process.
                    if _identify(process.pid, folder) == process:
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        time.sleep(0.02)


def check_not_inside(folder: Path, part: str | None = None) -> None:
    """Raise ClusterError if the caller is a process of the cluster."""
    callers = set(_ancestry())
    if any(process.pid in callers and part in (None, process.part) for process in processes(folder)):
        raise ClusterError(f"this is a job of the cluster in {folder}; run the command outside of it.")


def _ancestry() -> Iterator[int]:
    """The ids of this process, its parent, and so on."""
    pid = os.getpid()
    with contextlib.suppress(FileNotFoundError):  # a parent may have ended
        while pid:
            yield pid
            pid = int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
