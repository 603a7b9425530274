"""The processes of a cluster, recognised by what they are: a pid file may be missing, or name a process of somebody else."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf import ClusterError

_KILL_ORDER = ("slurmctld", "slurmd", "slurmstepd", "job", "srun", "munged")
"""Whoever would start or report something ends before the others."""

_KILL_SECONDS = 10.0
"""How long killed processes may take to be gone."""


@dataclass(frozen=True)
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


def processes(folder: Path) -> list[Process]:
    """All processes of the cluster in ``folder``, in the order in which to kill them."""
    found = [process for entry in os.listdir("/proc") if entry.isdigit() if (process := _recognise(int(entry), folder))]
    return sorted(found, key=lambda process: _KILL_ORDER.index(process.program))


def _recognise(pid: int, folder: Path) -> Process | None:
    """What a process is to the cluster in ``folder``; None if nothing, or if it is gone."""
    proc = Path("/proc", str(pid))
    try:
        program = os.path.basename(os.readlink(proc / "exe")).split("-")[0]  # slurmd-wlm on Debian
        if program == "munged":
            ours = os.fsencode(f"--socket={folder}/munged/socket") in (proc / "cmdline").read_bytes().split(b"\0")
            return Process(pid, program, program) if ours else None
        if program in ("slurmctld", "slurmd", "slurmstepd"):
            # Each daemon works in the folder of its part, and slurmstepd in that of its slurmd. Command line and
            # environment are no help: some of them overwrite both.
            place = Path(os.readlink(proc / "cwd").removesuffix(" (deleted)"))
            return Process(pid, program, place.name) if place.parent == folder else None
        environment = dict(line.partition(b"=")[::2] for line in (proc / "environ").read_bytes().split(b"\0"))
    except OSError:
        return None
    if environment.get(b"SLURM_CONF") != os.fsencode(folder / "slurm.conf"):
        return None
    # Only what runs on a node knows its name: the shell that salloc gives to a person does not, and is left alone.
    if b"SLURM_JOB_ID" in environment and b"SLURMD_NODENAME" in environment:
        return Process(pid, "job", os.fsdecode(environment[b"SLURMD_NODENAME"]))
    # Left alone, this one would wait for its step for ever.
    return Process(pid, program, program) if program == "srun" else None


def kill(folder: Path, part: str | None = None) -> None:
    """Kill all processes of the cluster in ``folder``, or those of one part, until there are none.

    Raises:
        ClusterError: It was called from inside one of the cluster's own jobs, or a process cannot be killed.
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
                    # Again, now that the number cannot pass to another process.
                    if _recognise(process.pid, folder) == process:
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        time.sleep(0.02)


def check_not_inside(folder: Path, part: str | None = None) -> None:
    """Refuse to kill whoever is asking."""
    askers = set(_ancestry())
    if any(process.pid in askers and part in (None, process.part) for process in processes(folder)):
        raise ClusterError(f"this is a job of the cluster in {folder}: call from outside of it.")


def _ancestry() -> Iterator[int]:
    """This process, its parent, and so on."""
    pid = os.getpid()
    with contextlib.suppress(FileNotFoundError):  # a parent may end meanwhile
        while pid:
            yield pid
            pid = int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
