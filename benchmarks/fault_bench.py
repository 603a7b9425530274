"""A test bench that submits runs to a one-machine Slurm cluster, and compares them with an undisturbed run."""

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from support import slurm_jobs
from support.waiting import wait_until
from support.wandb_reader import read_history
from support.wandb_server import WandbServer

from lockstep.checkpoint import latest_checkpoint
from lockstep.core import World
from lockstep.monitoring.report import weights_sha256
from lockstep.slurm import member_runs
from lockstep.slurm.cluster import Cluster

REPO = Path(__file__).resolve().parents[1]
CONFIG = (
    f"--config={REPO}/configs/digits.yaml",
    "--trainer.max_epochs=6",
    "--trainer.limit_train_batches=20",
    "--trainer.log_every_n_steps=5",
    "--model.network=lockstep.models.MLP",
    "--model.network.hidden=[256,256]",
    "--checkpoint.every_n_steps=10",
    "--data.batch_size=60",  # divisible by 2, 3 and 4 ranks
    "--trainer.callbacks+=fault_callbacks.StepRecorder",
    "--trainer.callbacks.diary=diary",
    "--trainer.callbacks.seconds=0.1",
)
"""A run of 120 steps of 0.1 s that saves every ten steps."""


@dataclass(frozen=True)
class Job(slurm_jobs.Job):
    """A run on the bench.

    Attributes:
        bench: The bench.
        is_online: Whether the run sends its metrics to the bench's W&B server.
    """

    bench: "FaultBench"
    is_online: bool

    def steps(self) -> list[int]:
        """All steps done so far, in order; a step that was repeated occurs twice."""
        diary = self.shell.project / "diary"
        return [int(line) for line in diary.read_text().split()] if diary.exists() else []

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Wait until this step is done."""
        wait_until(lambda: max(self.steps(), default=0) >= step, seconds, self.describe, interval=0.02)

    def wait_for_progress(self, seconds: float = 60) -> None:
        """Wait until the run does a step or has ended, at most ``seconds``."""
        steps, deadline = len(self.steps()), time.monotonic() + seconds
        while len(self.steps()) == steps and time.monotonic() < deadline and self.is_active():
            time.sleep(0.2)

    def wait_until_ended(self) -> dict[str, Any]:
        """Wait until the job has ended, and return its status."""
        wait_until(lambda: not self.is_active(), 400, self.describe, interval=1)
        return self.status()

    def is_active(self) -> bool:
        """Whether the job has not ended."""
        return bool(self.status()["exit_status"] == 3)

    def ranks(self) -> list[int]:
        """Process ids of the ranks, by rank."""
        agents = self.agents()
        # What a rank forks has its name.
        return [pid for pid in self._named("rank") if _parent(pid) in agents]

    def agents(self) -> list[int]:
        """Process ids of the agents, by node."""
        return self._named("agent")

    def _named(self, kind: str) -> list[int]:
        """Process ids of the ranks or agents, by number."""
        found = {}
        for pid, _, _ in self._processes():
            with contextlib.suppress(OSError):
                name, _, number = Path(f"/proc/{pid}/comm").read_text().strip().partition("-")
                if name == kind:
                    found[pid] = int(number)
        return sorted(found, key=lambda pid: found[pid])

    def processes(self) -> list[tuple[int, str]]:
        """Process id and name of all processes of the job, except the batch script and Slurm's own."""
        found = []
        for pid, command, _ in self._processes():
            if "slurm_script" not in command and "slurmstepd" not in command:
                with contextlib.suppress(OSError):
                    found.append((pid, Path(f"/proc/{pid}/comm").read_text().strip()))
        return found

    def _processes(self) -> Iterator[tuple[int, str, dict[str, str]]]:
        """Process id, command line and environment of all processes of the job."""
        for pid in self.bench.cluster.job_processes():
            try:
                entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            env = dict(entry.partition("=")[::2] for entry in entries)
            if env.get("LOCKSTEP_JOB") == self.id:
                yield pid, command, env

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a rank; -1 is the last one."""
        os.kill(self.ranks()[rank], number)

    def history(self) -> list[dict[str, Any]]:
        """The rows of the run in W&B, in order, without values that measure time; ``a.b`` is part ``b`` of a picture ``a``."""
        rows = map(_flat, self.bench.server.history(self.folder.name)) if self.is_online else read_history(self.folder)
        return [
            {name: value for name, value in row.items() if name == "_step" or not name.startswith(("rate/", "_"))}
            for row in rows
        ]

    def has_published_its_weights(self) -> bool:
        """Whether the newest checkpoint has the weights that the result reports."""
        found = latest_checkpoint(self.folder / "checkpoints")
        return found is not None and weights_sha256(found.weights(), World()) == self.result["weights_sha256"]

    def losses(self) -> list[float]:
        """The loss of each logged step."""
        return [row["train/loss"] for row in self.history() if "train/loss" in row]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the server has it, with names as in W&B's files."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name}.{part}": each for part, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _parent(pid: int) -> int:
    """The parent of a process; 0 if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class FaultBench:
    """Submits runs to a cluster.

    Args:
        cluster: The cluster.
        server: The W&B server of runs that are online.
        folder: Folder for all runs.
        nodes: Nodes of each run, with one rank per node.
        options: Arguments of each run, after ``CONFIG``.

    Attributes:
        mounts: File systems to unmount at the end.
        baselines: Undisturbed runs, by options.
        jobs: All jobs, in the order of their submission.
    """

    def __init__(self, cluster: Cluster, server: WandbServer, folder: Path, nodes: int, options: Sequence[str]) -> None:
        self.cluster, self.server, self.folder, self.nodes, self.options = cluster, server, folder, nodes, options
        self.mounts: list[Path] = []
        self.baselines: dict[tuple[str, ...], Job] = {}
        self.jobs: list[Job] = []
        self.env = slurm_jobs.login_environment(cluster, folder)

    def with_arguments(self, *arguments: str) -> "FaultBench":
        """The same bench, for runs with further arguments."""
        bench = copy.copy(self)
        bench.options = [*self.options, *arguments]
        return bench

    def undisturbed(self) -> Job:
        """A finished run without a fault; SystemExit if it does not finish."""
        key = tuple(self.options)
        if key not in self.baselines:
            job = self.submit()
            if (status := job.wait_until_ended())["state"] != "finished":
                raise SystemExit(f"the undisturbed run did not finish: {json.dumps(status)}")
            self.baselines[key] = job
        return self.baselines[key]

    def submit(self, *arguments: str, is_online: bool = False) -> Job:
        """Submit a run in a new project folder."""
        project = Path(tempfile.mkdtemp(dir=self.folder))
        for module in ("fault_callbacks", "fault_data", "wandb_calls"):
            shutil.copy(REPO / "tests" / "support" / f"{module}.py", project)
        mode = "online" if is_online else "offline"
        return self._submit(project, is_online, *CONFIG, *self.options, "--wandb.mode", mode, *arguments)

    def submit_until(self, step: int, *arguments: str) -> Job:
        """Submit a run and wait until it has done ``step``."""
        job = self.submit(*arguments)
        job.wait_for_step(step)
        return job

    def submit_sweep(self, runs: int) -> list[Job]:
        """Submit a sweep of equal runs; the steps of the last one are recorded like those of a single run."""
        diaries = ",".join([*(f"diary-{number}" for number in range(runs - 1)), "diary"])
        job = self.submit("--sweep", f"trainer.callbacks.diary={diaries}")
        members = [run.folder for run in member_runs(job.folder, runs)]
        return [replace(job, id=f"{job.id}_{number}", folder=folder) for number, folder in enumerate(members)]

    def submit_again(self, job: Job, *arguments: str) -> Job:
        """Submit another job for the same run."""
        return self._submit(job.shell.project, job.is_online, "--resume", str(job.folder), *arguments)

    def _submit(self, project: Path, is_online: bool, *arguments: str) -> Job:
        shell = slurm_jobs.Shell(self.cluster, project, self.env | (self.server.env if is_online else {}))
        job = shell.submit("--nodes", str(self.nodes), *arguments)
        self.jobs.append(Job(shell, job.id, job.folder, self, is_online))
        return self.jobs[-1]

    def sync(self, job: Job) -> None:
        """Upload the metrics that W&B has missed."""
        command = [sys.executable, "-m", "lockstep.cli", "sync", str(job.folder)]
        subprocess.run(command, env=self.env | self.server.env, check=True, capture_output=True)
