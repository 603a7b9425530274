"""A cluster: its folder, and starting, checking and stopping the daemons in it."""

import contextlib
import os
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from lockstep.slurm import parse_node_states
from lockstep.slurm.cluster import accounting
from lockstep.slurm.cluster.cgroups import cgroup_conf, check_cgroups, is_limited, remove_cgroups, slurm_conf_values
from lockstep.slurm.cluster.conf import (
    ClusterError,
    ClusterSpec,
    ClusterUsageError,
    cgroup_plugin,
    check_programs,
    cluster_name,
    free_ports,
    scrubbed_environment,
    search_path,
    slurm_conf,
)
from lockstep.slurm.cluster.folder import check_folder, claim_folder, read_marker, remove_folder
from lockstep.slurm.cluster.processes import DAEMONS, Process, check_not_inside, kill, processes

HEALTHY = {"idle", "mixed", "allocated", "completing", "planned"}
"""States of a node that works."""

_READY_SECONDS = 30.0
"""How long nodes may take to become idle; usually one second."""

_CANCEL_SECONDS = 5.0
"""How long cancelled jobs may take to end before their processes are killed."""


class Cluster:
    """A cluster in a folder, made by ``up`` or ``find``; as a context manager it is stopped at the end.

    Attributes:
        folder: Contains ``slurm.conf`` and, for each part, a folder with its log, sockets and state.
        spec: Nodes, resources and configuration.
        ports: Of slurmctld, of each node, and with accounting of slurmdbd; empty where unknown.
    """

    def __init__(self, folder: Path, spec: ClusterSpec, ports: Sequence[int] = ()) -> None:
        self.folder, self.spec, self.ports = folder.resolve(), spec, tuple(ports)

    @classmethod
    def up(
        cls,
        folder: Path,
        nodes: int = ClusterSpec.nodes,
        cpus: int = ClusterSpec.cpus,
        gpus: int = ClusterSpec.gpus,
        memory: int = ClusterSpec.memory,
        partitions: Sequence[str] = (),
        options: Sequence[str] = (),
        accounting: bool = False,
        cgroups: bool = False,
    ) -> Self:
        """Start a cluster and wait until all its nodes are idle. See ``ClusterSpec`` for the arguments.

        Args:
            folder: The cluster's folder: empty, or created by this call.

        Raises:
            ClusterError: Slurm is missing, the folder is not suitable, or a daemon failed. Nothing is left behind.
        """
        spec = ClusterSpec(nodes, cpus, gpus, memory, tuple(partitions), tuple(options), accounting, cgroups)
        check_programs(spec.accounting)
        if spec.cgroups:
            check_cgroups(folder.resolve())
        for retries_left in (2, 1, 0):
            cluster = cls(folder, spec, free_ports(nodes + 1 + accounting))
            claim_folder(cluster.folder, spec, cluster.ports)
            try:
                cluster._start()
                break
            except BaseException as error:
                # Another process may have taken a port between its choice and its use.
                lost_port = isinstance(error, ClusterError) and cluster._lost_a_port()
                cluster.down()
                if not lost_port or not retries_left:
                    raise
        return cluster

    @classmethod
    def find(cls, folder: Path) -> "Cluster | None":
        """Return the cluster in ``folder``, even if daemons or files are missing; None if nothing of it exists.

        Raises:
            ClusterError: The folder is not that of a cluster, or belongs to another user.
        """
        cluster = cls(folder, ClusterSpec())
        if not cluster.folder.exists():
            return cluster if cluster.processes() else None
        check_folder(cluster.folder)
        try:
            return cls(folder, *read_marker(cluster.folder))
        except FileNotFoundError:
            return None
        except ValueError:
            return cluster

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()

    @property
    def conf(self) -> Path:
        """The path of slurm.conf."""
        return self.folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which Slurm's commands use this cluster."""
        return {"SLURM_CONF": str(self.conf)}

    @property
    def parts(self) -> list[str]:
        """Names of the parts, one per daemon, in the order of their start."""
        database = ["mariadb", "slurmdbd"] if self.spec.accounting else []
        return ["munged", *database, "slurmctld", *self.spec.node_names]

    def port(self, part: str) -> int | None:
        """The port of a part; None if it has none, or if it is unknown."""
        return dict(zip(["slurmctld", *self.spec.node_names, "slurmdbd"], self.ports, strict=False)).get(part)

    def command(self, *argv: str, timeout: float | None = None) -> str:
        """Run one of Slurm's commands against this cluster and return its output.

        Raises:
            ClusterError: It failed, or took more than ``timeout`` seconds.
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
        """The state of each node, as Slurm calls it, in lower case: idle, allocated, down+not_responding, …"""
        return parse_node_states(self.command("scontrol", "--oneliner", "show", "node", timeout=timeout))

    def processes(self) -> list[Process]:
        """All processes of this cluster, in the order in which to kill them."""
        return processes(self.folder)

    def job_processes(self) -> list[int]:
        """Process ids of jobs on the nodes: of each slurmstepd and of all processes that it started."""
        return [process.pid for process in self.processes() if process.program in ("slurmstepd", "job")]

    def dead_parts(self) -> list[str]:
        """Parts whose daemon is not running."""
        alive = {process.part for process in self.processes() if process.program in DAEMONS}
        return [part for part in self.parts if part not in alive]

    def lose(self, part: str) -> None:
        """Kill a daemon other than munged, or a node with all processes of jobs there, without a shutdown."""
        self._check_part(part)
        kill(self.folder, part)

    def restore(self, part: str) -> None:
        """Restart a killed daemon and wait until Slurm uses it. The jobs of a lost node were requeued or have failed.

        Raises:
            ClusterError: It is running already, or failed.
        """
        self._check_part(part)
        if part not in self.dead_parts():
            raise ClusterError(f"{part} is not lost: its daemon is running.")
        if part == "slurmdbd" and "mariadb" in self.dead_parts():
            raise ClusterError("slurmdbd needs its database; restore mariadb first.")
        # Mark the node down, as Slurm marks a lost node in time: else it would believe that its jobs still run.
        is_node = part in self.spec.node_names
        if is_node and not self.node_states()[part].startswith("down"):
            self.command("scontrol", "update", f"NodeName={part}", "State=DOWN", "Reason=lost")
        self._launch(part)
        self._wait_for([part] if is_node else [], HEALTHY)

    def down(self) -> None:
        """Cancel all jobs, if all daemons are running, kill every process that is left, and remove the folder.

        Raises:
            ClusterError: The caller is a job of the cluster, or a process cannot be killed.
        """
        check_not_inside(self.folder)
        if not self.dead_parts():
            # Fails if a daemon hangs; all are killed next anyway.
            with contextlib.suppress(ClusterError):
                self._cancel_jobs()
        kill(self.folder)
        if self.spec.cgroups:
            remove_cgroups(self.spec.node_names)
        remove_folder(self.folder)

    def _cancel_jobs(self) -> None:
        """Cancel all jobs and wait a moment until they and each waiting srun have ended."""
        jobs = self.command("squeue", "--noheader", "--format=%A", timeout=_CANCEL_SECONDS).split()
        if jobs:
            self.command("scancel", *jobs, timeout=_CANCEL_SECONDS)
            deadline = time.monotonic() + _CANCEL_SECONDS
            running = {"slurmstepd", "job", "srun"}
            while running & {process.program for process in self.processes()} and time.monotonic() < deadline:
                time.sleep(0.05)

    def _check_part(self, part: str) -> None:
        if part not in (known := self.parts[1:]):
            raise ClusterUsageError(f"{part}: unknown; the cluster in {self.folder} has {', '.join(known)}.")

    def _start(self) -> None:
        for part in self.parts:
            (self.folder / part).mkdir()
        with open(os.open(self.folder / "munged" / "key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as key:
            key.write(os.urandom(128))
        gres = "AutoDetect=off\n"
        for number in range(self.spec.gpus):
            # Slurm counts only GPUs that have a device.
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
            gres += f"Name=gpu File={self.folder}/gpu{number}\n"
        (self.folder / "gres.conf").write_text(gres)
        (self.folder / "cgroup.conf").write_text(cgroup_conf(self.spec, without=cgroup_plugin()))
        self.conf.write_text(slurm_conf(self.folder, self.spec, self.ports, slurm_conf_values(self.spec)))
        if port := self.port("slurmdbd"):
            accounting.write_slurmdbd_conf(self.folder, port)
        for part in self.parts:
            self._launch(part)
            if part == "slurmdbd":  # slurmctld must find the cluster there
                self.command(*accounting.accounts_command(self.folder, cluster_name(self.folder)), timeout=_READY_SECONDS)
        self._wait_for(self.spec.node_names, {"idle"})
        if self.spec.cgroups and not is_limited(
            self.command("srun", "--quiet", "cat", "/proc/self/cgroup", timeout=_READY_SECONDS)
        ):
            raise ClusterError("--cgroups: Slurm does not put jobs into a cgroup with a memory limit on this machine.")

    def _launch(self, part: str) -> None:
        """Start the daemon of a part in the background."""
        folder = self.folder / part
        if part == "mariadb":
            return accounting.start_database(self.folder)
        if part == "munged":
            # Forced, because munged rejects a socket that other users cannot reach.
            argv = ["munged", "--force", f"--socket={folder}/socket"]
            argv += [f"--{file}-file={folder}/{file}" for file in ("key", "pid", "log", "seed")]
        else:
            argv = ["slurmd", "-N", part] if part in self.spec.node_names else [part]
            argv += ["-f", str(self.conf)] if part != "slurmdbd" else []
        # Not the environment of the caller: a long-lived daemon should not keep keys and tokens.
        env = {"PATH": search_path()} | self.env | accounting.database_environment(self.folder)
        started = subprocess.run(
            argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True
        )
        if started.returncode:
            raise self._failure(part, started.stderr.strip() or f"exit status {started.returncode}")
        if part == "slurmdbd":
            self._wait_for_slurmdbd()

    def _wait_for_slurmdbd(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not accounting.listens(self.port("slurmdbd") or 0):
            if "slurmdbd" in self.dead_parts() or time.monotonic() > deadline:
                raise self._failure("slurmdbd", "it does not answer")
            time.sleep(0.02)

    def _wait_for(self, nodes: Sequence[str], states: set[str]) -> None:
        """Wait until each of ``nodes`` is in one of ``states``."""
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            if dead := [part for part in self.dead_parts() if part in ("munged", "slurmctld", *nodes)]:
                raise self._failure(dead[0], "it ended")
            found: dict[str, str] = {}
            with contextlib.suppress(ClusterError):
                # Without a timeout a command tries for 9 s to reach a slurmctld that does not listen yet.
                found = self.node_states(timeout=1)
            waiting = [node for node in nodes if not set(found.get(node, "unknown").split("+")) <= states]
            if not waiting:
                return
            if time.monotonic() > deadline:
                state = found.get(waiting[0], "unknown") + self._reason(waiting[0])
                raise ClusterError(f"{waiting[0]} is not ready after {_READY_SECONDS:g} s: {state}.")
            time.sleep(0.05)

    def _reason(self, node: str) -> str:
        """Slurm's reason not to use a node."""
        with contextlib.suppress(ClusterError):
            shown = self.command("scontrol", "--oneliner", "show", "node", node, timeout=1)
            if reason := re.search(r" Reason=(.*) \[", shown):
                return f" ({reason[1]})"
        return ""

    def _failure(self, part: str, reason: str) -> ClusterError:
        """An error about a part, with the end of its log."""
        log = self.folder / part / "log"
        tail = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
        program = f"slurmd of {part}" if part in self.spec.node_names else part
        return ClusterError("\n  ".join([f"{program} failed: {reason}" + ("; its log ends:" if tail else "."), *tail]))

    def _lost_a_port(self) -> bool:
        return any("Address already in use" in log.read_text(errors="replace") for log in self.folder.glob("*/log"))
