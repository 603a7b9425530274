"""The fault table: what is killed, stopped or taken away, on a real one-machine Slurm cluster, and what it costs the run.

    make faults                                    all rows
    python benchmarks/faults.py [--rows 1,4,5]     some of them
    python benchmarks/faults.py --stage 3          with ZeRO

Each row is one run of four ranks on four nodes, disturbed, and compared with the same run undisturbed: attempts, steps done
twice, seconds lost, whether the weights are equal bit for bit, and whether W&B's history has every row of the undisturbed run,
once and with the same values.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_injectors as inject
from fault_bench import Bench, Cluster, Job, WandbServer, history, losses
from rich.console import Console
from rich.table import Table

FOREGROUND = ("--checkpoint.async_save", "false")


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        number: Of the row in the issue.
        name: What happens.
        strike: Does it to a bench, and returns the job.
        same_weights: Whether the weights can be those of the undisturbed run; else its losses are compared.
        ends: How the run is meant to end.
        attempts: How many attempts that takes at least; exactly so many where the run is meant to fail.
    """

    number: str
    name: str
    strike: inject.Strike
    same_weights: bool = True
    ends: str = "finished"
    attempts: int = 1


ROWS = [
    Row("1", "SIGKILL of a rank", inject.kill_rank(2), attempts=2),
    Row("1", "… saving in the foreground", inject.kill_rank(2, *FOREGROUND), attempts=2),
    Row("2", "SIGKILL of rank zero", inject.kill_rank(0), attempts=2),
    Row("3", "SIGKILL in ten writes of checkpoints", inject.kill_in_write, attempts=11),
    Row("4", "a node gone", inject.lose("n3", 57), attempts=2),
    Row("5", "preempted, 5 s of grace", inject.preempt("low"), attempts=2),
    Row("5", "… saving in the foreground", inject.preempt("low", *FOREGROUND), attempts=2),
    Row("5", "preempted without grace", inject.preempt("lowest"), attempts=2),
    Row("5", "… saving in the foreground", inject.preempt("lowest", *FOREGROUND), attempts=2),
    Row("6", "three times its time limit", inject.out_of_time(), attempts=4),
    Row("6", "… saving in the foreground", inject.out_of_time(*FOREGROUND), attempts=4),
    Row("7", "SIGTERM to one rank", inject.terminate((2,), 0), attempts=2),
    Row("7", "SIGTERM to all, a second apart", inject.terminate((3, 1, 0, 2), 1), attempts=2),
    Row("8", "scontrol requeue", inject.requeue, attempts=2),
    Row("9", "an exception once", inject.trouble("raise"), attempts=2),
    Row("9", "the same exception each time", inject.trouble("raise", once=False), ends="failed", attempts=2),
    Row("10", "SIGSTOP of a rank", inject.stop_rank, attempts=2),
    Row("11", "disk full from step 40 to 90", inject.fill_disk),
    Row("12", "newest checkpoint cut short", inject.damage("cut"), attempts=2),
    Row("12", "one bit of it flipped", inject.damage("bit"), attempts=2),
    Row("12", "a file of it missing", inject.damage("missing"), attempts=2),
    Row("13", "W&B's service killed", inject.kill_wandb),
    Row("13", "W&B's server away at first", inject.lose_server(begin=0, end=57)),
    Row("13", "W&B's server away for a while", inject.lose_server(begin=37, end=77)),
    Row("13", "W&B's server away to the end, then lockstep.sync", inject.lose_server(begin=57, end=None)),
    Row("14", "SIGKILL of a DataLoader's worker", inject.kill_worker, attempts=2),
    Row("15", "slurmctld down for 20 s while submitting", inject.no_controller_to_submit),
    Row("15", "slurmctld down for 20 s while running", inject.lose("slurmctld", 40)),
    Row("15", "… and a rank killed meanwhile", inject.kill_without_controller, attempts=2),
    Row("16", "the same run submitted twice more", inject.submit_twice),
    Row("17", "SIGKILL twice in one epoch", inject.kill_at(45, 55), attempts=3),
    Row("17", "SIGKILL in a validation", inject.trouble("SIGKILL", where="on_validation_batch_start", step=60), attempts=2),
    Row(
        "17", "SIGKILL in the last step of an epoch", inject.trouble("SIGKILL", where="on_train_batch_end", step=60), attempts=2
    ),
    Row("17", "SIGKILL before the first step", inject.trouble("SIGKILL", where="on_train_start", step=0), attempts=2),
    Row("17", "SIGKILL in the final test", inject.trouble("SIGKILL", where="on_test_batch_start", step=100), attempts=2),
    Row("18", "20 random SIGKILLs", inject.random_kills(), attempts=15),
    Row("18", "… saving in the foreground", inject.random_kills(*FOREGROUND), attempts=15),
    Row("19", "from 4 nodes to 2 and back", inject.change_nodes, same_weights=False, attempts=3),
]


def judge(row: Row, job: Job, told: dict[str, Any], plain: Job) -> tuple[list[str], bool]:
    """The cells of a row, and whether all is as promised."""
    expected, result = (json.loads((of.folder / "result.json").read_text()) for of in (plain, job))
    steps, lost = job.steps(), result.get("seconds", {}).get("lost", 0)
    is_same = result.get("weights_sha256") == expected["weights_sha256"]
    got, due = history(job), history(plain)
    numbers = [row["_step"] for row in got]
    is_complete = got == due if row.same_weights else numbers == [row["_step"] for row in due]
    same = "yes" if is_same else "no"
    if not row.same_weights:
        apart = max(abs(a - b) for a, b in zip(losses(job), losses(plain), strict=True))
        is_same, same = apart < 1e-4, f"losses within {apart:.0e}"
    is_good = (
        told["state"] == row.ends and told["attempt"] >= row.attempts and (row.ends == "failed" or (is_same and is_complete))
    )
    if row.ends == "failed":
        is_good &= told["attempt"] == row.attempts and "It has ended 2 times in a row" in told["message"]
    cells = [str(told["attempt"]), str(len(steps) - len(set(steps))), f"{lost:.1f}", same, "yes" if is_complete else "no"]
    return cells if row.ends == "finished" else [*cells[:3], "", ""], is_good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="numbers of rows, with commas (default: all)")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="DeepSpeed's ZeRO of this stage instead of DDP")
    given = parser.parse_args()
    wanted = given.rows
    rows = [row for row in ROWS if wanted is None or row.number in wanted.split(",")]
    partitions = [
        "debug Default=YES PriorityTier=5",
        "low PriorityTier=1 PreemptMode=REQUEUE GraceTime=5",
        "lowest PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
        "high PriorityTier=10",
    ]
    options = ["PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE", "SlurmdTimeout=5", "MessageTimeout=2", "KillWait=2"]
    columns = ("row", "fault", "attempts", "steps twice", "seconds lost", "weights equal", "W&B complete", "ended")
    table, bad = Table(*columns, box=None), 0
    with tempfile.TemporaryDirectory(prefix="f-") as name, WandbServer() as server:
        folder = Path(name)
        with Cluster.up(folder / "c", nodes=4, cpus=4, partitions=partitions, options=options) as cluster:
            strategy = [] if given.stage is None else ["--strategy", "deepspeed", "--deepspeed.stage", str(given.stage)]
            bench = Bench(cluster, server, folder, strategy)
            for row in rows:
                began = time.monotonic()
                try:
                    job = row.strike(bench)
                    told = job.end()
                    cells, is_good = judge(row, job, told, bench.plain)
                except (SystemExit, Exception) as error:
                    cells, is_good, told = [str(error)], False, {"state": "", "attempts": []}
                cells = [*cells, *[""] * (5 - len(cells)), told["state"]]
                table.add_row(row.number, row.name, *cells)
                bad += not is_good
                reasons = [attempt["reason"] for attempt in told["attempts"] if attempt["reason"]]
                print(
                    f"{time.monotonic() - began:.0f} s | {row.number} | {row.name} | {' | '.join(cells)} | {reasons}",
                    file=sys.stderr,
                )
            for disk in bench.mounts:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)
    Console(width=150).print(table)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
