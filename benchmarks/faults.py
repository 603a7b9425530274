"""The fault table: faults injected into runs on a one-machine Slurm cluster, and what they cost.

    make faults                                    all rows
    python benchmarks/faults.py --rows 1,4,5b      some rows
    python benchmarks/faults.py --stage 3          with DeepSpeed ZeRO

Each row is one run of four ranks on four nodes, compared with an undisturbed run: attempts, steps done twice, seconds lost,
whether the weights are equal bit for bit, and whether W&B's history has the same rows with the same values. The runs of a row
that does not meet its promises are kept in build/faults.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_injectors as inject
from fault_bench import FaultBench, Job
from rich.console import Console
from rich.table import Table
from support.wandb_server import WandbServer

from lockstep.runs import METRICS_ROW
from lockstep.slurm.cluster import Cluster

FOREGROUND = ("--checkpoint.async_save", "false")
TWO_LOADERS = ("--data=fault_data.TwoLoaders", "--model=fault_data.MeanOfLosses")
CURRICULUM = ("--trainer.callbacks+=fault_data.Curriculum",)


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        label: What ``--rows`` calls it.
        name: What happens.
        inject: Submits a run to a bench and disturbs it.
        attempts: Least number of attempts of the run; the exact number if it is expected to fail.
        same_weights: Whether the weights must equal those of the undisturbed run; otherwise the losses must be close.
        state: The expected state of the job at its end.
        arguments: Further arguments of the run and of the undisturbed one.
        is_timed: Whether the end depends on the time: then weights and rows are not those of the undisturbed run.
        loses_pictures: Whether pictures that the classifier logs to W&B may be lost; the log says so. Metrics may not.
    """

    label: str
    name: str
    inject: inject.Injector
    attempts: int = 1
    same_weights: bool = True
    state: str = "finished"
    arguments: tuple[str, ...] = ()
    is_timed: bool = False
    loses_pictures: bool = False


EARLY = ("monitor=val/loss", "mode=max", "patience=3")  # the loss falls: it ends after the fourth epoch
EARLY_STOPPING = ("--trainer.callbacks+=EarlyStopping", *(f"--trainer.callbacks.{option}" for option in EARLY))
SWA = (
    "--trainer.callbacks+=StochasticWeightAveraging",
    "--trainer.callbacks.swa_lrs=0.001",
    "--trainer.callbacks.swa_epoch_start=3",
)
MAX_TIME = ("--trainer.max_time={seconds: 9}",)
HANG = ("--checkpoint.timeout_seconds=3",)
IMAGES = ("--trainer.callbacks+=wandb_calls.WandbCalls",)

ROWS = [
    Row("1", "SIGKILL of a rank", inject.kill_rank(-1), 2),
    Row("1b", "… saving in the foreground", inject.kill_rank(-1, *FOREGROUND), 2),
    Row("2", "SIGKILL of rank zero", inject.kill_rank(0), 2),
    Row("3", "SIGKILL while writing ten checkpoints", inject.kill_while_writing, 11),
    Row("4", "a node lost", inject.lose("n3", 57), 2),
    Row("5", "preemption, 5 s of grace", inject.preempt("low"), 2),
    Row("5b", "… saving in the foreground", inject.preempt("low", *FOREGROUND), 2),
    Row("5c", "preemption without grace", inject.preempt("lowest"), 2),
    Row("5d", "… saving in the foreground", inject.preempt("lowest", *FOREGROUND), 2),
    Row("6", "three times its time limit", inject.exceed_time_limit(), 4),
    Row("6b", "… saving in the foreground", inject.exceed_time_limit(*FOREGROUND), 4),
    Row("7", "SIGTERM to one rank", inject.terminate((2,), 0), 2),
    Row("7b", "SIGTERM to all, a second apart", inject.terminate((3, 1, 0, 2), 1), 2),
    Row("8", "scontrol requeue", inject.requeue, 2),
    Row("9", "an exception once", inject.callback("raise"), 2),
    Row("9b", "the same exception each time", inject.callback("raise", repeat=True), 2, state="failed"),
    Row("10", "SIGSTOP of a rank", inject.stop_rank, 2),
    Row("11", "disk full from step 40 to 90", inject.fill_disk, loses_pictures=True),
    Row("12", "newest checkpoint truncated", inject.damage_checkpoint("truncated"), 2),
    Row("12b", "one bit of it flipped", inject.damage_checkpoint("flipped"), 2),
    Row("12c", "a file of it missing", inject.damage_checkpoint("missing"), 2),
    Row("13", "W&B's service killed", inject.kill_wandb),
    Row("13b", "W&B's server unreachable at first", inject.lose_wandb_server(begin=0, end=57)),
    Row("13c", "W&B's server unreachable for a while", inject.lose_wandb_server(begin=37, end=77)),
    Row("13d", "W&B's server unreachable to the end, then lockstep sync", inject.lose_wandb_server(begin=57, end=None)),
    Row("14", "SIGKILL of a DataLoader worker", inject.kill_data_worker, 2),
    Row("15", "slurmctld down for 20 s while submitting", inject.submit_without_controller),
    Row("15b", "slurmctld down for 20 s while running", inject.lose("slurmctld", 40)),
    Row("15c", "… and a rank killed meanwhile", inject.kill_without_controller, 2),
    Row("16", "the same run submitted twice more", inject.submit_twice),
    Row("16b", "two jobs of the run released at once", inject.release_two, 2),
    Row("16c", "SIGKILL in one of three runs of a sweep", inject.kill_in_sweep, 2),
    Row("17", "SIGKILL twice in one epoch", inject.kill_at(45, 55), 3),
    Row("17b", "SIGKILL during validation", inject.callback("SIGKILL", "on_validation_batch_start", 60), 2),
    Row("17c", "SIGKILL in the last step of an epoch", inject.callback("SIGKILL", "on_train_batch_end", 60), 2),
    Row("17d", "SIGKILL before the first step", inject.callback("SIGKILL", "on_train_start", 0), 2),
    Row("17e", "SIGKILL during the final test", inject.callback("SIGKILL", "on_test_batch_start", 100), 2),
    Row("18", "20 random SIGKILLs", inject.random_kills(), 15),
    Row("18b", "… saving in the foreground", inject.random_kills(*FOREGROUND), 15),
    Row("19", "from 4 nodes to 2 and back", inject.change_nodes, 3, same_weights=False),
    Row("20", "a disk that hangs in a save", inject.callback("hang", arguments=HANG), 2),
    Row("21", "SIGKILL twice before EarlyStopping", inject.kill_at(57, 77), 3, arguments=EARLY_STOPPING),
    Row("21b", "SIGKILL twice while SWA averages", inject.kill_at(75, 105), 3, arguments=SWA),
    Row(
        "21c", "SIGKILL in the test of SWA's average", inject.callback("SIGKILL", "on_test_batch_start", 100), 2, arguments=SWA
    ),
    Row("21d", "SIGKILL before max_time is over", inject.kill_at(37), 2, arguments=MAX_TIME, is_timed=True),
    Row("22", "SIGKILL twice with an own W&B image every step", inject.kill_at(45, 75), 3, arguments=IMAGES),
    Row("22b", "preemption, likewise", inject.preempt("low"), 2, arguments=IMAGES),
    Row("23", "two train loaders, SIGKILL twice in one epoch", inject.kill_at(47, 55), 3, arguments=TWO_LOADERS),
    Row("23b", "a curriculum callback, SIGKILL twice in one epoch", inject.kill_at(47, 55), 3, arguments=CURRICULUM),
    Row("24", "SIGKILL of the agent of the first node", inject.signal_agent(0, signal.SIGKILL), 2),
    Row("24b", "SIGKILL of another agent", inject.signal_agent(2, signal.SIGKILL), 2),
    Row("24c", "SIGSTOP of the agent of the first node", inject.signal_agent(0, signal.SIGSTOP), 2),
    Row("24d", "SIGSTOP of another agent", inject.signal_agent(2, signal.SIGSTOP), 2),
    Row("24e", "a rank that ignores SIGTERM when another fails", inject.kill_beside_stubborn, 2),
]
COLUMNS = ("row", "fault", "attempts", "steps twice", "seconds lost", "weights equal", "W&B complete", "state")
PARTITIONS = (
    "debug Default=YES PriorityTier=5",
    "low PriorityTier=1 PreemptMode=REQUEUE GraceTime=5",
    "lowest PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
    "high PriorityTier=10",
)
OPTIONS = ("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE", "SlurmdTimeout=5", "MessageTimeout=2", "KillWait=2")


def judge(row: Row, job: Job, status: dict[str, Any], baseline: Job) -> tuple[list[str], bool]:
    """Compare a run with the undisturbed one; return the cells of its row, and whether it meets its promises."""
    steps = job.steps()
    result = job.result
    lost = result.get("seconds", {}).get("lost", 0)
    cells = [str(status["attempt"]), str(len(steps) - len(set(steps))), f"{lost:.1f}"]
    if row.state == "failed":
        is_stopped = status["attempt"] == row.attempts and "It has failed 2 times in a row" in status["message"]
        return [*cells, "", ""], status["state"] == row.state and is_stopped
    actual, expected = job.history(), baseline.history()
    if row.loses_pictures:
        actual, expected = ([entry for entry in rows if METRICS_ROW in entry] for rows in (actual, expected))
    is_complete = actual == expected
    is_same = result.get("weights_sha256") == baseline.result["weights_sha256"] and job.has_published_its_weights()
    same = "yes" if is_same else "no"
    if row.is_timed:
        is_complete = [entry["_step"] for entry in actual] == list(range(len(actual)))
        is_same = job.has_published_its_weights()
        same = "published" if is_same else "no"
    if not row.same_weights:
        is_complete = [entry["_step"] for entry in actual] == [entry["_step"] for entry in expected]
        difference = max(abs(a - b) for a, b in zip(job.losses(), baseline.losses(), strict=True))
        is_same, same = difference < 1e-4, f"losses within {difference:.0e}"
    is_good = status["state"] == row.state and status["attempt"] >= row.attempts and is_same and is_complete
    return [*cells, same, "yes" if is_complete else "no"], is_good


def run_row(row: Row, bench: FaultBench) -> tuple[list[str], bool]:
    """Run one row; return its cells, and whether it meets its promises. An error becomes the first cell."""
    start, earlier = time.monotonic(), len(bench.jobs)
    state, reasons = "", []
    try:
        bench = bench.with_arguments(*row.arguments)
        baseline = bench.undisturbed()
        job = row.inject(bench)
        status = job.wait_until_ended()
        state, reasons = status["state"], [attempt["reason"] for attempt in status["attempts"] if attempt["reason"]]
        cells, is_good = judge(row, job, status, baseline)
    except (SystemExit, Exception) as error:  # the other rows still run
        cells, is_good = [str(error), "", "", "", ""], False
    if not is_good:
        for job in bench.jobs[earlier:]:
            kept = Path("build", "faults", f"{row.label}-{job.folder.name}")
            shutil.copytree(job.folder, kept)
            (kept / "status.txt").write_text(job.describe())
            shutil.copy(bench.cluster.folder / "slurmctld" / "log", kept / "slurmctld.log")
    cells = [row.label, row.name, *cells, state]
    print(f"{time.monotonic() - start:.0f} s | {' | '.join(cells)} | {reasons}", file=sys.stderr)
    return cells, is_good


def parse_rows(text: str) -> list[Row]:
    """The rows whose labels ``text`` lists, separated by commas."""
    by_label = {row.label: row for row in ROWS}
    if unknown := [label for label in text.split(",") if label not in by_label]:
        raise argparse.ArgumentTypeError(f"unknown rows {', '.join(unknown)}; rows: {', '.join(by_label)}")
    return [by_label[label] for label in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and return the exit status: 1 if a row does not meet its promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=parse_rows, default=ROWS, help="labels of rows, separated by commas (default: all)")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="use DeepSpeed ZeRO of this stage instead of DDP")
    parser.add_argument("--srun", action="store_true", help="restart through srun instead of the agents")
    parser.add_argument("--nodes", type=int, default=4, help="nodes of each run; most rows need four")
    parser.add_argument("--step-seconds", type=float, default=0.1, help="time of a step")
    options = parser.parse_args(arguments)
    run_options = [f"--trainer.callbacks.seconds={options.step_seconds}"]
    if options.stage is not None:
        run_options += ["--strategy=deepspeed", f"--deepspeed.stage={options.stage}"]
    if options.srun:
        run_options.append("--run.warm_restarts=false")
    table, failed = Table(*COLUMNS, box=None), 0
    with tempfile.TemporaryDirectory(prefix="f-") as name, WandbServer() as server:
        folder = Path(name)
        with Cluster.up(folder / "c", nodes=options.nodes, cpus=4, partitions=PARTITIONS, options=OPTIONS) as cluster:
            bench = FaultBench(cluster, server, folder, options.nodes, run_options)
            for row in options.rows:
                cells, is_good = run_row(row, bench)
                table.add_row(*cells)
                failed += not is_good
            for disk in bench.mounts:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)
    Console(width=150).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
