"""The fault table: what is killed, stopped or taken away, on a real one-machine Slurm cluster, and what it costs the run.

    make faults                                    all rows
    python benchmarks/faults.py [--rows 1,4,5]     some of them

Each row is one run of four ranks on four nodes, disturbed, and compared with the same run undisturbed: attempts, steps done
twice, seconds lost, whether the weights are equal bit for bit, and whether W&B's history has every row once.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from disturbed import Bench, Cluster, Job, metric_rows, wandb_steps
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        number: Of the row in the issue.
        name: What happens.
        strike: Does it to a bench, and returns the job.
        same_weights: Whether the weights can be those of the undisturbed run.
        ends: How the run is meant to end.
    """

    number: str
    name: str
    strike: Callable[[Bench], Job]
    same_weights: bool = True
    ends: str = "finished"


def kill_rank(rank: int, *arguments: str) -> Callable[[Bench], Job]:
    """SIGKILL in the middle of a step."""

    def strike(bench: Bench) -> Job:
        job = bench.submit(*arguments)
        job.wait_for_step(57)
        job.kill(rank)
        return job

    return strike


def kill_in_write(bench: Bench) -> Job:
    """SIGKILL of rank zero at ten moments of a write."""
    job = bench.submit()
    for number in range(10):
        job.wait_for_step(min(110, 12 + 10 * number))
        deadline = time.monotonic() + 60
        while not (list(job.folder.glob("checkpoints/.step-*/*")) and job.ranks()):
            if time.monotonic() > deadline:
                break
        time.sleep(0.0005 * number)
        if ranks := job.ranks():
            os.kill(ranks[0], signal.SIGKILL)
        time.sleep(1)
    return job


def lose_node(bench: Bench) -> Job:
    """A whole node gone, and back later."""
    job = bench.submit()
    job.wait_for_step(57)
    bench.cluster.lose("n3")
    time.sleep(20)
    bench.cluster.restore("n3")
    return job


def preempt(partition: str) -> Callable[[Bench], Job]:
    """A job of higher priority takes all nodes for some seconds."""

    def strike(bench: Bench) -> Job:
        job = bench.submit("--partition", partition)
        job.wait_for_step(57)
        bench.cluster.command(
            "sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"
        )
        return job

    return strike


def out_of_time(bench: Bench) -> Job:
    """A run three times as long as its time limit: the allocation's end is taken as near."""
    return bench.submit("--time", "1", "--trainer.callbacks.seconds=1.2")


def terminate(ranks: tuple[int, ...], pause: float) -> Callable[[Bench], Job]:
    """SIGTERM to some ranks, one after the other."""

    def strike(bench: Bench) -> Job:
        job = bench.submit()
        job.wait_for_step(57)
        pids = job.ranks()
        for rank in ranks:
            try:
                os.kill(pids[rank], signal.SIGTERM)
            except ProcessLookupError:  # it has left already
                break
            time.sleep(pause)
        return job

    return strike


def requeue(bench: Bench) -> Job:
    """scontrol requeue."""
    job = bench.submit()
    job.wait_for_step(57)
    bench.cluster.command("scontrol", "requeue", job.id)
    return job


def trouble(
    what: str, *arguments: str, once: bool = True, where: str = "on_train_batch_end", step: int = 57, rank: int = 1
) -> Callable[[Bench], Job]:
    """Something that a callback does."""
    given = {"what": what, "once": "once" if once else "/proc/never", "where": where, "step": step, "rank": rank}
    more = ["--trainer.callbacks+=trouble.Trouble", *(f"--trainer.callbacks.{name}={value}" for name, value in given.items())]
    return lambda bench: bench.submit(*arguments, *more)


def damage(how: str) -> Callable[[Bench], Job]:
    """Kill a rank, and damage the newest checkpoint before the ranks are back."""

    def strike(bench: Bench) -> Job:
        job = bench.submit()
        job.wait_for_step(57)
        job.kill(1)
        newest = max(job.folder.glob("checkpoints/step-*"))
        file = newest / "model.ckpt"
        content = bytearray(file.read_bytes())
        if how == "missing":
            (newest / "rank-2.pt").unlink()
        elif how == "cut":
            file.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        return job

    return strike


def stop_rank(bench: Bench) -> Job:
    """SIGSTOP of a rank."""
    job = bench.submit("--run.hang_seconds", "5")
    job.wait_for_step(57)
    job.kill(2, signal.SIGSTOP)
    return job


def kill_worker(bench: Bench) -> Job:
    """SIGKILL of a DataLoader's worker."""
    job = bench.submit("--data.num_workers", "1")
    job.wait_for_step(57)
    pid = job.ranks()[1]
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    return job


def fill_disk(bench: Bench) -> Job:
    """The run's disk is full for half of the run."""
    disk = Path(tempfile.mkdtemp(dir=bench.folder))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    bench.mounts.append(disk)
    job = bench.submit("--run.root", str(disk))
    job.wait_for_step(40)
    with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()
    job.wait_for_step(90)
    (disk / "filler").unlink()
    return job


def kill_wandb(bench: Bench) -> Job:
    """SIGKILL of W&B's service."""
    job = bench.submit()
    job.wait_for_step(57)
    subprocess.run(["pkill", "-KILL", "-P", str(job.ranks()[0]), "wandb-core"], check=False)
    return job


def no_controller(bench: Bench) -> Job:
    """slurmctld down for 20 seconds."""
    job = bench.submit()
    job.wait_for_step(40)
    bench.cluster.lose("slurmctld")
    time.sleep(20)
    bench.cluster.restore("slurmctld")
    return job


def random_kills(*arguments: str) -> Callable[[Bench], Job]:
    """SIGKILL of a random process of the job every few seconds, 20 times."""

    def strike(bench: Bench) -> Job:
        chance = random.Random(1)
        job = bench.submit(*arguments)
        kills = 0
        while kills < 20 and job.status()["exit_status"] == 3:
            time.sleep(chance.uniform(6, 16))
            if ranks := job.ranks():
                try:
                    os.kill(chance.choice(ranks), signal.SIGKILL)
                    kills += 1
                except ProcessLookupError:
                    pass
        return job

    return strike


ROWS = [
    Row("1", "SIGKILL of a rank", kill_rank(2)),
    Row("1", "… saving in the foreground", kill_rank(2, "--checkpoint.background", "false")),
    Row("2", "SIGKILL of rank zero", kill_rank(0)),
    Row("3", "SIGKILL in ten writes of checkpoints", kill_in_write),
    Row("4", "a node gone", lose_node),
    Row("5", "preempted, 5 s of grace", preempt("low")),
    Row("5", "preempted without grace", preempt("lowest")),
    Row("6", "three times its time limit", out_of_time),
    Row("7", "SIGTERM to one rank", terminate((2,), 0)),
    Row("7", "SIGTERM to all, a second apart", terminate((3, 1, 0, 2), 1)),
    Row("8", "scontrol requeue", requeue),
    Row("9", "an exception once", trouble("raise")),
    Row("9", "the same exception each time", trouble("raise", once=False), same_weights=False, ends="failed"),
    Row("10", "SIGSTOP of a rank", stop_rank),
    Row("11", "disk full from step 40 to 90", fill_disk),
    Row("12", "newest checkpoint cut short", damage("cut")),
    Row("12", "one bit of it flipped", damage("bit")),
    Row("12", "a file of it missing", damage("missing")),
    Row("13", "W&B's service killed", kill_wandb),
    Row("14", "SIGKILL of a DataLoader's worker", kill_worker),
    Row("15", "slurmctld down for 20 s", no_controller),
    Row("17", "SIGKILL in a validation", trouble("SIGKILL", where="on_validation_batch_start", step=60)),
    Row("17", "SIGKILL before the first step", trouble("SIGKILL", where="on_train_start", step=0)),
    Row("17", "SIGKILL in the final test", trouble("SIGKILL", where="on_test_batch_start", step=100)),
    Row("18", "20 random SIGKILLs", random_kills()),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="numbers of rows, with commas (default: all)")
    wanted = parser.parse_args().rows
    rows = [row for row in ROWS if wanted is None or row.number in wanted.split(",")]
    partitions = [
        "debug Default=YES PriorityTier=5",
        "low PriorityTier=1 PreemptMode=REQUEUE GraceTime=5",
        "lowest PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
        "high PriorityTier=10",
    ]
    options = ["PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE", "SlurmdTimeout=5", "MessageTimeout=2", "KillWait=2"]
    table = Table("row", "fault", "attempts", "steps twice", "seconds lost", "weights equal", "W&B complete", "ended", box=None)
    with tempfile.TemporaryDirectory(prefix="f-") as name:
        folder = Path(name)
        with Cluster.up(folder / "c", nodes=4, cpus=4, partitions=partitions, options=options) as cluster:
            bench = Bench(cluster, folder)
            expected = json.loads((bench.plain.folder / "result.json").read_text())
            for row in rows:
                job = row.strike(bench)
                told = job.end()
                result = json.loads((job.folder / "result.json").read_text())
                steps = job.steps()
                count = len(metric_rows(job.folder)) if (job.folder / "metrics.csv").exists() else 0
                equal = result.get("weights_sha256") == expected["weights_sha256"]
                complete = wandb_steps(job.folder) == list(range(1, count + 1))
                table.add_row(
                    row.number,
                    row.name,
                    str(told["attempt"]),
                    str(len(steps) - len(set(steps))),
                    f"{result.get('seconds', {}).get('lost', 0):.1f}",
                    "yes" if equal else "no",
                    "yes" if complete else "no",
                    told["state"],
                )
                print(f"{row.name}: {told['state']}; {[a['reason'] for a in told['attempts']]}", file=sys.stderr)
            for disk in bench.mounts:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
