"""A run on a one-machine Slurm cluster that is disturbed, and what it leaves to be compared with the same run undisturbed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO / "slurm"), str(REPO / "tests")]

from daemons import Cluster  # noqa: E402

CONFIG = (
    *("--config", str(REPO / "configs/digits.yaml"), "--trainer.max_epochs", "6", "--trainer.log_every_n_steps", "5"),
    *("--model.network", "lockstep.networks.MLP", "--model.network.hidden", "[256,256]", "--checkpoint.every_n_steps", "10"),
    *("--trainer.callbacks+=trouble.Steps", "--trainer.callbacks.diary=diary", "--trainer.callbacks.seconds=0.1"),
    *("--wandb.mode", "offline"),
)
"""120 steps of a tenth of a second, saved every ten."""


class Job:
    """A run that is disturbed."""

    def __init__(self, bench: "Bench", arguments: tuple[str, ...], nodes: str) -> None:
        self.bench = bench
        self.project = Path(tempfile.mkdtemp(dir=bench.folder))
        shutil.copy(REPO / "tests" / "trouble.py", self.project)
        command = [sys.executable, str(REPO / "launch/slurm.py"), "--nodes", nodes, *CONFIG, *arguments]
        done = subprocess.run(command, cwd=self.project, env=bench.env, capture_output=True, text=True)
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

    def ranks(self) -> list[int]:
        """Pids of the ranks, by rank."""
        found: dict[int, int] = {}
        for pid in self.bench.cluster.job_processes():
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            env = dict(word.partition("=")[::2] for word in words)
            if env.get("SLURM_JOB_ID") == self.id and "SLURM_PROCID" in env and b"submitit" in line and b"_submit" in line:
                found.setdefault(int(env["SLURM_PROCID"]), pid)
        return [found[rank] for rank in sorted(found)]

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a rank."""
        os.kill(self.ranks()[rank], number)

    def status(self) -> dict[str, Any]:
        """What jobs.py says."""
        command = [sys.executable, str(REPO / "launch/jobs.py"), "status", self.id, "--json"]
        done = subprocess.run(command, cwd=self.project, env=self.bench.env, capture_output=True, text=True)
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def end(self, seconds: float = 240) -> dict[str, Any]:
        """Wait until the job is over."""
        deadline = time.monotonic() + seconds
        while (told := self.status())["exit_status"] == 3 and time.monotonic() < deadline:
            time.sleep(1)
        return told


class Bench:
    """The cluster and the undisturbed run."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.mounts: list[Path] = []
        self.env = os.environ | cluster.env | {"XDG_STATE_HOME": str(folder / "state")}
        self.plain = self.submit()
        told = self.plain.end()
        if told["state"] != "finished":
            raise SystemExit(f"the undisturbed run did not finish: {told}")

    def submit(self, *arguments: str, nodes: str = "4") -> Job:
        """A new run."""
        return Job(self, arguments, nodes)


def metric_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics without those that measure time."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if not name.startswith("rate/")} for row in csv.DictReader(file)]


def wandb_steps(folder: Path) -> list[int]:
    """Numbers of the rows in W&B's files, in their order."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        for line in subprocess.run(reader, capture_output=True, text=True).stdout.splitlines():
            if (record := json.loads(line)).get("type") == "history":
                found.append(int(record["history"]["item"]["_step"]))
    return found
