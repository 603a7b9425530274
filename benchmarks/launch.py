"""Duration of a submission with launch/slurm.py, with a ten-line submitit script and with sbatch; and of a sweep of 1,000 runs.

    python slurm/cluster.py run -- python benchmarks/launch.py [--rounds 10]

Measures whole processes from start to exit, interleaved in rounds; prints medians in milliseconds, and ratios to the submitit
script. All jobs are held, and cancelled at the end.
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


def submit(command: list[str], folder: Path, jobs: list[str]) -> float:
    """Return the duration of a submission in seconds, and append its job id to ``jobs``.

    It runs in its own folder: files of other processes would be copied as code of a run.
    """
    folder.mkdir(exist_ok=True)
    env = os.environ | {"XDG_STATE_HOME": str(folder / "state")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled after the first submission
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True)
    duration = time.perf_counter() - start
    jobs.append(done.stdout.split()[-1])
    return duration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="number of rounds (default 10)")
    parser.add_argument("--files", type=int, default=19_000, metavar="N", help="files of the large folder (default 19000)")
    parser.add_argument("--sweep-runs", type=int, default=1000, metavar="N", help="runs of the sweep (default 1000)")
    arguments = parser.parse_args()
    jobs: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "ten_lines.py"
        script.write_text(SUBMITIT)
        launch = [sys.executable, str(REPO / "launch" / "slurm.py"), "--nodes", "4", "--sbatch=--hold"]
        commands = {
            "sbatch": ["sbatch", "--hold", "--nodes=4", "--wrap", "srun true"],
            "ten lines of submitit": [sys.executable, str(script)],
            "launch/slurm.py": launch,
            "launch/slurm.py --no-snapshot": [*launch, "--no-snapshot"],
        }
        times: dict[str, list[float]] = {label: [] for label in commands}
        try:
            for round_ in range(arguments.rounds + 1):
                for label, command in commands.items():
                    duration = submit(command, folder / label.replace("/", " "), jobs)
                    if round_:  # the first one compiles modules
                        times[label].append(duration)
            repository = folder / "repository"
            for number in range(arguments.files):
                path = repository / f"part{number // 200}" / f"module{number}.py"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"VALUE = {number}\n" * 50)
            time.sleep(2)  # a file that is new may still change unnoticed, and is not linked
            large, again = submit(launch, repository, jobs), submit(launch, repository, jobs)
            seeds = ",".join(map(str, range(arguments.sweep_runs)))
            sweep = submit([*launch, "--sweep", f"seed_everything={seeds}"], folder / "sweep", jobs)
        finally:
            subprocess.run(["scancel", *jobs], check=True)
    medians = {label: statistics.median(values) for label, values in times.items()}
    medians[f"launch/slurm.py in a folder of {arguments.files:,} files"] = large
    medians["the same once more, when no file has changed"] = again
    medians[f"a sweep of {arguments.sweep_runs:,}"] = sweep
    table = Table("", "ms", "× submitit", box=None)
    for label, median in medians.items():
        table.add_row(label, f"{1000 * median:.0f}", f"{median / medians['ten lines of submitit']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
