"""Submit jobs with the launch scripts, and wait for them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.slurm import find_job, query_status
from lockstep.slurm.cluster import Cluster
from support.waiting import wait_until

REPO = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shell:
    """A shell on the login node.

    Attributes:
        cluster: The cluster.
        project: Working directory.
        env: Environment of the launch scripts.
        jobs: Ids of the submitted jobs.
    """

    cluster: Cluster
    project: Path
    env: dict[str, str]
    jobs: list[str] = field(default_factory=list)

    def __call__(self, script: str, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """Run a script of the repository."""
        command = [sys.executable, str(REPO / script), *arguments]
        return subprocess.run(command, cwd=self.project, env=self.env | env, capture_output=True, text=True, timeout=170)

    def submit(self, *arguments: str, **env: str) -> "Job":
        """Submit a job with ``launch/slurm.py``, which must succeed."""
        done = self("launch/slurm.py", *arguments, **env)
        assert done.returncode == 0, done.stderr
        self.jobs.append(done.stdout.strip())
        return Job(self, self.jobs[-1], Path(done.stderr.strip().splitlines()[-1].removeprefix("run folder ")))

    def close(self) -> None:
        """Cancel the jobs that have not ended, and wait for their end."""
        if left := self._unfinished():
            self.cluster.command("scancel", *left)
            wait_until(lambda: not self._unfinished(), seconds=20, describe=self.queue)

    def _unfinished(self) -> set[str]:
        return {id.partition("_")[0] for id in self.queue()} & set(self.jobs)

    def queue(self) -> list[str]:
        """Ids of all jobs of the cluster that have not ended."""
        return self.cluster.command("squeue", "--noheader", "--format=%i").split()


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    shell: Shell
    id: str
    folder: Path

    def status(self) -> dict[str, Any]:
        """``jobs.py status --json``, with the command's exit status under ``exit``."""
        done = self.shell("launch/jobs.py", "status", self.id, "--json")
        status: dict[str, Any] = json.loads(done.stdout)
        return status | {"exit": done.returncode}

    def wait(self, *states: str, seconds: float = 90) -> dict[str, Any]:
        """Wait as ``wait_for_state``, and return the status."""
        self.wait_for_state(*states, seconds=seconds)
        return self.status()

    def wait_for_state(self, *states: str, seconds: float = 90) -> None:
        """Wait until the job, or each run of a sweep, is in one of ``states``, or without ``states`` until it has ended."""

        def reached() -> bool:  # in this process: a new one for each poll would take CPUs from the job
            statuses = query_status([find_job(self.id, self.shell.env)], self.shell.env)
            return all(status.state in states or (not states and not status.is_active) for status in statuses)

        wait_until(reached, seconds, self.describe, interval=0.3)

    def wait_for_step(self, step: int, seconds: float = 60) -> None:
        """Wait until ``status.json`` reports this step or a later one."""
        path = self.folder / "status.json"
        wait_until(lambda: path.exists() and json.loads(path.read_text())["step"] >= step, seconds, self.describe)

    def log(self, rank: int = 0) -> str:
        """The log of a rank in the newest attempt, as ``jobs.py logs`` prints it."""
        return self.shell("launch/jobs.py", "logs", self.id, "--rank", str(rank)).stdout

    def describe(self) -> str:
        """Status and log, for the message of a failed test."""
        return self.shell("launch/jobs.py", "status", self.id, "--json").stdout + self.log()

    @property
    def result(self) -> dict[str, Any]:
        """``result.json``."""
        result: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return result


def login_environment(cluster: Cluster, folder: Path) -> dict[str, str]:
    """This process's environment, with the cluster's and without Slurm's variables; lockstep's own files go to ``folder``."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    return env | cluster.env | {"XDG_STATE_HOME": str(folder / "state"), "XDG_CONFIG_HOME": str(folder / "config")}
