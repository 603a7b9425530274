"""What a submission costs: launch/slurm.py, a ten-line submitit script and bare sbatch, side by side; and a sweep of 1,000.

    python slurm/cluster.py run -- python benchmarks/launch.py [--rounds 10]

Whole processes, in milliseconds, from start to exit; they take turns, round by round, and the median round counts. All jobs
are held and cancelled at the end. Ratios are to the submitit script.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPO = Path(__file__).resolve().parent.parent
SUBMITIT = """
import submitit


def train(lr):
    return lr


executor = submitit.AutoExecutor(folder="jobs")
executor.update_parameters(nodes=4, tasks_per_node=1, timeout_min=60, slurm_additional_parameters={"hold": True})
print(executor.submit(train, 0.1).job_id)
"""


def seconds(command: list[str], folder: Path) -> float:
    """Time of one whole process, which must succeed, in a folder of its own: what others leave there would be code to it."""
    folder.mkdir(exist_ok=True)
    env = os.environ | {"XDG_STATE_HOME": str(folder / "state")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # who submits twice has compiled modules
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "ten_lines.py"
        script.write_text(SUBMITIT)
        ours = [sys.executable, str(REPO / "launch" / "slurm.py"), "--nodes", "4", "--sbatch=--hold"]
        commands = {
            "sbatch": ["sbatch", "--hold", "--nodes=4", "--wrap", "srun true"],
            "ten lines of submitit": [sys.executable, str(script)],
            "launch/slurm.py": ours,
            "launch/slurm.py --no-snapshot": [*ours, "--no-snapshot"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        try:
            for round_ in range(rounds + 1):
                for label, command in commands.items():
                    spent = seconds(command, folder / label.replace("/", " "))
                    if round_:  # the first one compiles
                        times[label].append(spent)
            sweep = seconds([*ours, "--sweep", f"seed_everything={','.join(map(str, range(1000)))}"], folder / "sweep")
        finally:
            subprocess.run(["scancel", "--me"], check=True)
    medians = {label: statistics.median(values) for label, values in times.items()}
    table = Table("", "ms", "× submitit", box=None)
    for label, median in medians.items():
        table.add_row(label, f"{1000 * median:.0f}", f"{median / medians['ten lines of submitit']:.2f}")
    table.add_row("a sweep of 1,000", f"{1000 * sweep:.0f}", f"{sweep / medians['ten lines of submitit']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
