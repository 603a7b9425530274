"""The cluster itself: a folder, and the daemons that live in it."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

from conf import (
    ClusterError,
    Shape,
    UsageError,
    cgroup_plugin,
    check_programs,
    free_ports,
    scrubbed_environment,
    search_path,
    slurm_conf,
)
from processes import Process, check_not_inside, kill, processes

_MARKER = "lockstep-cluster.json"
"""The file that makes a folder a cluster's; no other folder is ever deleted."""

HEALTHY = {"idle", "mixed", "allocated", "completing", "planned"}
"""What Slurm calls a node that works."""

_SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket: unix(7) gives 108 with the final zero."""

_READY_SECONDS = 30.0
"""How long nodes may take to become idle; they take about one."""

_CANCEL_SECONDS = 5.0
"""How long cancelled jobs may take to end before they are killed."""


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
        check_programs()
        for tries_left in (2, 1, 0):
            cluster = cls(folder, shape, free_ports(nodes + 1))
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
        env = scrubbed_environment() | self.env
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
        """All processes of this cluster, in the order in which to kill them."""
        return processes(self.folder)

    def job_processes(self) -> list[int]:
        """What is still there of jobs on the nodes: pids of slurmstepd and of all that they started."""
        return [process.pid for process in self.processes() if process.program in ("slurmstepd", "job")]

    def dead_parts(self) -> list[str]:
        """Parts whose daemon does not run."""
        alive = {process.part for process in self.processes() if process.program in ("munged", "slurmctld", "slurmd")}
        return [part for part in self.parts if part not in alive]

    def lose(self, part: str) -> None:
        """Kill a node's daemon and all that jobs run there, or slurmctld, without a goodbye."""
        self._check_part(part)
        kill(self.folder, part)

    def restore(self, part: str) -> None:
        """Start a lost daemon again and wait until Slurm uses it; the jobs of a node have then been requeued or failed.

        Raises:
            ClusterError: It runs already, or failed.
        """
        self._check_part(part)
        if part not in self.dead_parts():
            raise ClusterError(f"{part} is not lost: it runs.")
        # A machine is away for longer than Slurm needs to notice: else jobs would seem to run on, on a node without them.
        if part != "slurmctld" and not self.node_states()[part].startswith("down"):
            self.command("scontrol", "update", f"NodeName={part}", "State=DOWN", "Reason=lost")
        self._launch(part)
        self._wait_for([part] if part != "slurmctld" else [], HEALTHY)

    def down(self) -> None:
        """End every process and remove the folder, whatever is left of the cluster; a whole one cancels its jobs first.

        Raises:
            ClusterError: It was called from inside one of the cluster's own jobs, or a process cannot be killed.
        """
        check_not_inside(self.folder)
        if not self.dead_parts():
            # In vain where a daemon hangs; all are killed in any case.
            with contextlib.suppress(ClusterError):
                self._cancel_jobs()
        kill(self.folder)
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

    def _check_part(self, part: str) -> None:
        if part not in (known := ["slurmctld", *self.shape.node_names]):
            raise UsageError(f"{part}: the cluster in {self.folder} has only {', '.join(known)}.")

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
                json.dump({"shape": asdict(self.shape), "ports": self.ports}, marker)
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
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={cgroup_plugin()}\n")
        self.conf.write_text(slurm_conf(self.folder, self.shape, self.ports))
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
        env = {"PATH": search_path()} | self.env
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
