"""What one node costs with 1, 2, 4 and 8 ranks: files opened, memory, time to the first step, time to restart a killed rank.

    python benchmarks/agent.py
    python benchmarks/agent.py --ranks 1,8 --kills 3

Runs the agent of a node as srun would start it, without Slurm. Opened files are counted with strace (``apt-get install
strace``), in a run of their own. Memory is that of the agent and its ranks: RSS counts shared pages in each process, PSS once.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from support.waiting import wait_until

from lockstep.runs import Owner, Run

REPO = Path(__file__).resolve().parents[1]
CODE = """
import sys
from pathlib import Path
from lockstep.slurm import NodeTask
folder = Path(sys.argv[1])
NodeTask(folder, folder / "slurm", "fit", tuple(sys.argv[3:]), "", int(sys.argv[2]), None)()
"""
COLUMNS = ("ranks", "files opened", "RSS MB", "PSS MB", "first step s", "restart s (median)")


class Node:
    """The agent of a job of one node, and its run."""

    def __init__(self, ranks: int, folder: Path, steps: int, prefix: Sequence[str] = ()) -> None:
        self.run = Run.create(folder, "agent")
        self.diary = self.run.folder / "diary"
        (self.run.folder / "slurm").mkdir()
        attempt = self.run.claim_attempt(Owner(job="1"))
        slurm = {"JOB_ID": 1, "STEP_ID": 0, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "STEP_NUM_TASKS": 1, "STEP_NUM_NODES": 1}
        env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        env |= {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        env |= {"LOCKSTEP_JOB": "1", "LOCKSTEP_ATTEMPT": str(attempt), "WANDB_MODE": "disabled"}
        env["PYTHONPATH"] = os.pathsep.join((str(REPO / "src"), str(REPO / "tests")))
        arguments = (
            *("--config", str(REPO / "configs" / "digits.yaml"), "--run.root", str(folder), "--data.batch_size", "64"),
            *("--trainer.max_steps", str(steps), "--checkpoint.every_n_steps", "5", "--run.test_after_fit", "false"),
            "--trainer.callbacks+=support.fault_callbacks.StepRecorder",
            f"--trainer.callbacks.diary={self.diary}",
            "--trainer.callbacks.seconds=0.05",
        )
        command = [*prefix, sys.executable, "-c", CODE, str(self.run.folder), str(ranks), *arguments]
        self.started = time.monotonic()
        with (self.run.folder / "output").open("w") as output:
            self.process = subprocess.Popen(command, env=env, stdout=output, stderr=output)

    def steps(self) -> int:
        """Steps done so far, repeated ones too."""
        return len(self.diary.read_text().split()) if self.diary.exists() else 0

    def wait_for_steps(self, count: int) -> float:
        """Wait until ``count`` steps are done, and return the time."""
        wait_until(lambda: self.steps() >= count or self.process.poll() is not None, 300, self._output, interval=0.01)
        assert self.process.poll() is None or self.steps() >= count, self._output()
        return time.monotonic()

    def wait_for_attempt(self, attempt: int) -> None:
        """Wait until this attempt has begun."""
        wait_until(lambda: self.run.newest_attempt == attempt, 60, self._output, interval=0.01)

    def ranks(self) -> list[int]:
        """Process ids of the ranks, by rank."""
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name.startswith("rank-"):
                found[int(name.removeprefix("rank-"))] = int(pid)
        return [found[rank] for rank in sorted(found)]

    def memory(self) -> tuple[float, float]:
        """RSS and PSS of the agent and its ranks in MB."""
        totals = {"Rss": 0, "Pss": 0}
        for pid in (self.process.pid, *self.ranks()):
            for name, kilobytes in re.findall(
                r"^(Rss|Pss): +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE
            ):
                totals[name] += int(kilobytes)
        return totals["Rss"] / 1000, totals["Pss"] / 1000

    def close(self) -> None:
        """End the node."""
        self.process.kill()
        self.process.wait()

    def _output(self) -> str:
        return (self.run.folder / "output").read_text()


def count_opened_files(ranks: int, folder: Path) -> str:
    """Number of ``openat`` calls of a whole run of two steps."""
    if shutil.which("strace") is None:
        return "no strace"
    record = folder / "strace"
    node = Node(ranks, folder, 2, ("strace", "--follow-forks", f"--output={record}", "--trace=openat"))
    node.process.wait()
    result = json.loads(node.run.result.read_text())
    assert result["status"] == "finished", result
    return str(sum("openat(" in line for line in record.read_text().splitlines()))


def measure(ranks: int, kills: int, folder: Path) -> tuple[str, ...]:
    """The cells of one row."""
    opened = count_opened_files(ranks, folder)
    node = Node(ranks, folder, 100_000)
    try:
        first = node.wait_for_steps(1) - node.started
        node.wait_for_steps(12)
        rss, pss = node.memory()
        restarts = []
        for number in range(kills):
            killed, steps = time.monotonic(), node.steps()
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.ranks()[number % ranks], signal.SIGKILL)
            # A step or two may still end after the kill.
            node.wait_for_attempt(number + 2)
            steps = max(steps, node.steps())
            restarts.append(node.wait_for_steps(steps + 1) - killed)
            node.wait_for_steps(steps + 12)
    finally:
        node.close()
    return str(ranks), opened, f"{rss:.0f}", f"{pss:.0f}", f"{first:.1f}", f"{statistics.median(restarts):.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4,8", help="numbers of ranks, separated by commas")
    parser.add_argument("--kills", type=int, default=10, help="restarts of each number of ranks")
    options = parser.parse_args(arguments)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for ranks in map(int, options.ranks.split(",")):
        with tempfile.TemporaryDirectory(prefix="agent-") as name:
            Path(name).chmod(0o700)
            print("| " + " | ".join(measure(ranks, options.kills, Path(name))) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
