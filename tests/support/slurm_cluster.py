"""The launch scripts as a person runs them, against a real Slurm cluster of four pretend nodes."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conf import search_path
from daemons import Cluster

REPO = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """A job that the test has submitted."""

    shell: "Shell"
    id: str
    folder: Path

    def status(self) -> dict[str, Any]:
        """``jobs.py status --json``, with its exit status under ``exit``."""
        done = self.shell("launch/jobs.py", "status", self.id, "--json")
        return json.loads(done.stdout) | {"exit": done.returncode}

    def wait(self, *states: str, seconds: float = 90) -> dict[str, Any]:
        """Wait until the job is in one of these states; of none, until it has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.status()
            if status["state"] in states or (not states and status["exit_status"] != 3):
                return status
            time.sleep(0.3)
        raise AssertionError(f"{self.status()}\n{self.log()}")

    def wait_for_step(self, step: int, seconds: float = 60) -> None:
        """Wait until ``status.json`` says that training has come to this step."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            path = self.folder / "status.json"
            if path.exists() and json.loads(path.read_text())["step"] >= step:
                return
            time.sleep(0.1)
        raise AssertionError(f"{self.status()}\n{self.log()}")

    def log(self, rank: int = 0) -> str:
        """The log of a rank in the newest attempt, as ``jobs.py logs`` shows it."""
        return self.shell("launch/jobs.py", "logs", self.id, "--rank", str(rank)).stdout

    @property
    def result(self) -> dict[str, Any]:
        """``result.json``."""
        return json.loads((self.folder / "result.json").read_text())


@dataclass(frozen=True)
class Shell:
    """A shell on the login node, in a project of one's own."""

    cluster: Cluster
    project: Path
    env: dict[str, str]
    jobs: list[str] = field(default_factory=list)

    def __call__(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPO / script), *arguments]
        return subprocess.run(command, cwd=self.project, env=self.env | env, capture_output=True, text=True, timeout=170)

    def submit(self, *arguments: str, **env: str) -> Job:
        """``launch/slurm.py``, which must succeed."""
        done = self("launch/slurm.py", *arguments, **env)
        assert done.returncode == 0, done.stderr
        self.jobs.append(done.stdout.strip())
        return Job(self, self.jobs[-1], Path(done.stderr.strip().splitlines()[-1].removeprefix("run folder ")))

    def close(self) -> None:
        """Cancel what still runs and wait until it is gone."""
        if left := {id.partition("_")[0] for id in self.queue()} & set(self.jobs):
            self.cluster.command("scancel", *left)
            deadline = time.monotonic() + 20
            while left & {id.partition("_")[0] for id in self.queue()} and time.monotonic() < deadline:
                time.sleep(0.1)

    def queue(self) -> list[str]:
        """Ids of all jobs that Slurm has not ended."""
        return self.cluster.command("squeue", "--noheader", "--format=%i").split()


MISSING = "Slurm is not installed; as root: apt-get install slurmctld slurmd slurm-client munge (or: make slurm)"


@pytest.fixture(scope="session")
def slurm_is_here() -> None:
    """Skip where Slurm is missing, except where it must not be (in CI)."""
    if shutil.which("slurmctld", path=search_path()) is None:
        if os.environ.get("LOCKSTEP_REQUIRE_SLURM"):
            pytest.fail(MISSING)
        pytest.skip(MISSING)


@pytest.fixture(scope="session")
def cluster(slurm_is_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes of four CPUs and 64 GB; `short` ends jobs after a minute, `gpu` nodes have none."""
    folder = tmp_path_factory.mktemp("c") / "c"
    with Cluster.up(
        folder,
        nodes=4,
        cpus=4,
        memory=64000,
        partitions=["debug Default=YES", "short MaxTime=1"],
        options=["SlurmdTimeout=5", "MessageTimeout=2", "KillWait=2"],
    ) as cluster:
        yield cluster


@pytest.fixture
def shell(cluster: Cluster, tmp_path: Path) -> Iterator[Shell]:
    """A project with ``toy_model.py`` in it; the jobs that the test has left are cancelled at its end."""
    yield (made := make_shell(cluster, tmp_path))
    made.close()


@pytest.fixture(scope="module")
def long_shell(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """The same for a job that outlives a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield (made := make_shell(cluster, tmp_path_factory.mktemp("long")))
    made.close()


def make_shell(cluster: Cluster, folder: Path) -> Shell:
    """A login shell in a new project below ``folder``."""
    project = folder / "pro ject"
    project.mkdir()
    for name in ("toy_model.py", "toy_model.yaml"):
        shutil.copy(Path(__file__).with_name(name), project)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    env |= {**cluster.env, "XDG_STATE_HOME": str(folder / "state"), "XDG_CONFIG_HOME": str(folder / "config")}
    return Shell(cluster, project, env)
