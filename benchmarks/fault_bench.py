"""A run on a one-machine Slurm cluster that is disturbed, and what it leaves to be compared with the same run undisturbed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "slurm"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from daemons import Cluster
from support.wandb_server import WandbServer

REPO = Path(__file__).resolve().parents[1]

CONFIG = (
    *("--config", str(REPO / "configs/digits.yaml"), "--trainer.max_epochs", "6", "--trainer.log_every_n_steps", "5"),
    *("--model.network", "lockstep.models.MLP", "--model.network.hidden", "[256,256]", "--checkpoint.every_n_steps", "10"),
    *("--data.batch_size", "60", "--trainer.limit_train_batches", "20"),  # goes into 2, 3 and 4 ranks
    *(
        "--trainer.callbacks+=fault_callbacks.StepRecorder",
        "--trainer.callbacks.diary=diary",
        "--trainer.callbacks.seconds=0.1",
    ),
)
"""120 steps of a tenth of a second, saved every ten."""


class Job:
    """A run that is disturbed."""

    def __init__(self, bench: "Bench", project: Path, arguments: Sequence[str], online: bool) -> None:
        self.bench, self.project, self.online = bench, project, online
        command = [sys.executable, str(REPO / "launch/slurm.py"), *arguments]
        env = bench.env | (bench.server.env if online else {})
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        self.id, self.folder = done.stdout.strip(), Path(done.stderr.strip().splitlines()[-1].removeprefix("run folder "))

    def steps(self) -> list[int]:
        """All steps that were done so far."""
        diary = self.project / "diary"
        return [int(line) for line in diary.read_text().split()] if diary.exists() else []

    def wait_for_step(self, step: int) -> None:
        """Wait until that many different steps are done."""
        deadline = time.monotonic() + 120
        while max(self.steps(), default=0) < step:
            if time.monotonic() > deadline:
                raise SystemExit(f"job {self.id} does not come to step {step}: {self.status()}")
            time.sleep(0.02)

    def wait_for_work(self, seconds: float = 60) -> None:
        """Wait until it does a step, or is over."""
        done, deadline = len(self.steps()), time.monotonic() + seconds
        while len(self.steps()) == done and time.monotonic() < deadline and self.status()["exit_status"] == 3:
            time.sleep(0.2)

    def ranks(self) -> list[int]:
        """Pids of the ranks, by rank."""
        found: dict[int, int] = {}
        for pid, line, env in self._all():
            if "SLURM_PROCID" in env and "submitit" in line and "_submit" in line:
                found[pid] = int(env["SLURM_PROCID"])
        # A rank's forked children look like it, and have smaller numbers where those have begun again from the start.
        ranks = {rank: pid for pid, rank in found.items() if _parent(pid) not in found}
        return [ranks[rank] for rank in sorted(ranks)]

    def processes(self) -> list[tuple[int, str]]:
        """Pid and name of all processes of the job, but not the batch script, nor Slurm's own."""
        names = {pid: line for pid, line, _ in self._all() if "slurm_script" not in line and "slurmstepd" not in line}
        return [(pid, " ".join(line.split())[-70:]) for pid, line in names.items()]

    def _all(self) -> Iterator[tuple[int, str, dict[str, str]]]:
        for pid in self.bench.cluster.job_processes():
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            env = dict(word.partition("=")[::2] for word in words)
            if env.get("SLURM_JOB_ID") == self.id:
                yield pid, line, env

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a rank."""
        os.kill(self.ranks()[rank], number)

    def status(self) -> dict[str, Any]:
        """What jobs.py says."""
        command = [sys.executable, str(REPO / "launch/jobs.py"), "status", self.id, "--json"]
        done = subprocess.run(command, cwd=self.project, env=self.bench.env, capture_output=True, text=True)
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def end(self, seconds: float = 400) -> dict[str, Any]:
        """Wait until the job is over."""
        deadline = time.monotonic() + seconds
        while (told := self.status())["exit_status"] == 3 and time.monotonic() < deadline:
            time.sleep(1)
        return told


def _parent(pid: int) -> int:
    """The parent of a process; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Bench:
    """The cluster and the undisturbed run."""

    def __init__(self, cluster: Cluster, server: WandbServer, folder: Path, strategy: Sequence[str]) -> None:
        self.cluster, self.server, self.folder, self.strategy = cluster, server, folder, strategy
        self.mounts: list[Path] = []
        self.env = os.environ | cluster.env | {"XDG_STATE_HOME": str(folder / "state")}
        self.plain = self.submit()
        told = self.plain.end()
        if told["state"] != "finished":
            raise SystemExit(f"the undisturbed run did not finish: {told}")

    def submit(self, *arguments: str, nodes: str = "4", online: bool = False) -> Job:
        """A new run."""
        project = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copy(REPO / "tests" / "support" / "fault_callbacks.py", project)
        mode = "online" if online else "offline"
        return Job(self, project, ["--nodes", nodes, *CONFIG, *self.strategy, "--wandb.mode", mode, *arguments], online)

    def again(self, job: Job) -> Job:
        """Another job for the same run."""
        return Job(self, job.project, ["--resume", str(job.folder), "--nodes", "4"], job.online)

    def sync(self, job: Job) -> None:
        """Give W&B what it has missed."""
        command = [sys.executable, "-m", "lockstep.cli", "sync", str(job.folder)]
        subprocess.run(command, env=self.env | self.server.env, check=True, capture_output=True)


def history(job: Job) -> list[dict[str, float]]:
    """The rows that W&B has of a run, in their order, without those of their values that measure time."""
    if job.online:
        found = job.bench.server.history(job.folder.name)
    else:
        found = [item for file in sorted(job.folder.glob("wandb/offline-run-*/*.wandb")) for item in _inspect(file)]
    return [{n: v for n, v in row.items() if n == "_step" or not n.startswith(("rate/", "_"))} for row in found]


def losses(job: Job) -> list[float]:
    """The loss of every logged step."""
    return [row["train/loss"] for row in history(job) if "train/loss" in row]


def _inspect(file: Path) -> Iterator[dict[str, float]]:
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    for line in subprocess.run(reader, capture_output=True, text=True).stdout.splitlines():
        if (record := json.loads(line)).get("type") == "history":
            yield record["history"]["item"]
