"""Fault injectors: functions that submit a run to a bench, disturb it, and return it."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fault_bench import FaultBench, Job
from support.faults import fault
from support.waiting import wait_until

Injector = Callable[[FaultBench], Job]


def kill_rank(rank: int, *arguments: str) -> Injector:
    """SIGKILL in the middle of a step."""

    def inject(bench: FaultBench) -> Job:
        job = bench.submit_until(57, *arguments)
        job.kill(rank)
        return job

    return inject


def signal_agent(node: int, number: signal.Signals) -> Injector:
    """A signal to the agent of a node."""

    def inject(bench: FaultBench) -> Job:
        job = bench.submit_until(57, "--run.hang_timeout_seconds", "5")
        os.kill(job.agents()[node], number)
        return job

    return inject


def kill_beside_stubborn(bench: FaultBench) -> Job:
    """SIGKILL of a rank while another one ignores SIGTERM."""
    job = callback("ignore")(bench)
    wait_until((job.shell.project / "marker").exists, 120, job.describe)
    job.kill(2)
    return job


def kill_while_writing(bench: FaultBench) -> Job:
    """SIGKILL of rank zero at ten moments while it writes a checkpoint."""
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


def lose(part: str, step: int) -> Injector:
    """A node with all its processes, or slurmctld, is gone for 20 seconds."""

    def inject(bench: FaultBench) -> Job:
        job = bench.submit_until(step)
        bench.cluster.lose(part)
        time.sleep(20)
        bench.cluster.restore(part)
        return job

    return inject


def preempt(partition: str, *arguments: str) -> Injector:
    """A job of higher priority takes all nodes for some seconds."""

    def inject(bench: FaultBench) -> Job:
        job = bench.submit_until(57, "--partition", partition, *arguments)
        nodes = f"--nodes={bench.nodes}"
        bench.cluster.command("sbatch", "--partition=high", nodes, "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
        return job

    return inject


def exceed_time_limit(*arguments: str) -> Injector:
    """The run takes three times its time limit."""
    return lambda bench: bench.submit("--time", "1", "--trainer.callbacks.seconds=1.2", *arguments)


def terminate(ranks: tuple[int, ...], pause: float) -> Injector:
    """SIGTERM to some ranks, with a pause after each."""

    def inject(bench: FaultBench) -> Job:
        job = bench.submit_until(57)
        pids = job.ranks()
        for rank in ranks:
            try:
                os.kill(pids[rank], signal.SIGTERM)
            except ProcessLookupError:  # the rank has already stopped
                break
            time.sleep(pause)
        return job

    return inject


def requeue(bench: FaultBench) -> Job:
    """scontrol requeue."""
    job = bench.submit_until(57)
    bench.cluster.command("scontrol", "requeue", job.id)
    return job


def callback(
    action: str, hook: str = "on_train_batch_end", step: int = 57, repeat: bool = False, arguments: Sequence[str] = ()
) -> Injector:
    """A fault that a callback of rank one injects."""
    options = {"hook": hook, "step": step, "rank": 1, "repeat": repeat}
    return lambda bench: bench.submit(*arguments, *fault("marker", action, "fault_callbacks", **options))


def damage_checkpoint(how: str) -> Injector:
    """Kill a rank, and damage the newest checkpoint before the run resumes from it."""

    def inject(bench: FaultBench) -> Job:
        job = bench.submit_until(57)
        job.kill(1)
        newest = max(job.folder.glob("checkpoints/step-*"))
        file = newest / "model.ckpt"
        content = bytearray(file.read_bytes())
        if how == "missing":
            (newest / "rank-2.pt").unlink()
        elif how == "truncated":
            file.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        return job

    return inject


def stop_rank(bench: FaultBench) -> Job:
    """SIGSTOP of a rank."""
    job = bench.submit_until(57, "--run.hang_timeout_seconds", "5")
    job.kill(2, signal.SIGSTOP)
    return job


def kill_data_worker(bench: FaultBench) -> Job:
    """SIGKILL of a DataLoader worker."""
    job = bench.submit_until(57, "--data.num_workers", "1")
    pid = job.ranks()[1]
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    return job


def fill_disk(bench: FaultBench) -> Job:
    """The disk of the run folder is full from step 40 to step 90."""
    disk = Path(tempfile.mkdtemp(dir=bench.folder))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    bench.mounts.append(disk)
    job = bench.submit_until(40, "--run.root", str(disk))
    with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()
    job.wait_for_step(90)
    (disk / "filler").unlink()
    return job


def kill_wandb(bench: FaultBench) -> Job:
    """SIGKILL of W&B's service process."""
    job = bench.submit_until(57)
    subprocess.run(["pkill", "-KILL", "-P", str(job.ranks()[0]), "wandb-core"], check=True)
    return job


def submit_without_controller(bench: FaultBench) -> Job:
    """slurmctld is down for 20 seconds while the run is submitted."""
    bench.cluster.lose("slurmctld")
    restore = threading.Timer(20, bench.cluster.restore, ["slurmctld"])
    restore.start()
    job = bench.submit()
    restore.join()
    return job


def kill_without_controller(bench: FaultBench) -> Job:
    """slurmctld is down for 20 seconds, in which a rank is killed."""
    job = bench.submit_until(57)
    bench.cluster.lose("slurmctld")
    job.kill(1)
    time.sleep(20)
    bench.cluster.restore("slurmctld")
    return job


def submit_twice(bench: FaultBench) -> Job:
    """Two more jobs for a run that is training: both must be refused."""
    job = bench.submit_until(57)
    for other in [bench.submit_again(job) for _ in range(2)]:
        status = other.wait_until_ended()
        if status["exit_status"] != 2:
            raise SystemExit(f"a second job of the run was not refused: {status}")
    return job


def release_two(bench: FaultBench) -> Job:
    """A cancelled run is resumed by two jobs that are released at the same moment: one must be refused."""
    job = bench.submit_until(57)
    bench.cluster.command("scancel", job.id)
    job.wait_until_ended()
    both = [bench.submit_again(job, "--sbatch=--hold") for _ in range(2)]
    bench.cluster.command("scontrol", "release", *(other.id for other in both))
    statuses = {other.wait_until_ended()["exit_status"]: other for other in both}
    if set(statuses) != {0, 2}:
        raise SystemExit(f"two jobs of a run ended with {sorted(statuses)} instead of 0 and 2")
    return statuses[0]


def kill_in_sweep(bench: FaultBench) -> Job:
    """SIGKILL of a rank of the last run of a sweep, which has the job id of the whole array: no other run may notice."""
    *others, last = bench.submit_sweep(3)
    last.wait_for_step(57)
    last.kill(1)
    for other in others:
        status = other.wait_until_ended()
        if (status["state"], status["attempt"]) != ("finished", 1):
            raise SystemExit(f"another run of the sweep was disturbed: {status}")
    return last


def kill_at(*steps: int) -> Injector:
    """SIGKILL of one rank after another, at the given steps."""

    def inject(bench: FaultBench) -> Job:
        job = bench.submit()
        for rank, step in enumerate(steps):
            job.wait_for_step(step)
            job.kill(rank)
        return job

    return inject


def change_nodes(bench: FaultBench) -> Job:
    """Two of four nodes are lost and come back later."""
    job = bench.submit_until(37, "--nodes", "2-4")
    for node in ("n3", "n4"):
        bench.cluster.lose(node)
    job.wait_for_step(70)
    smaller = job.status()["progress"]["world_size"]
    for node in ("n3", "n4"):
        bench.cluster.restore(node)
    bench.cluster.command("scontrol", "requeue", job.id)
    job.wait_for_step(90)
    world_sizes = (smaller, job.status()["progress"]["world_size"])
    if world_sizes != (2, 4):
        raise SystemExit(f"the run resumed with world sizes {world_sizes} instead of (2, 4)")
    return job


def lose_wandb_server(*, begin: int, end: int | None) -> Injector:
    """W&B's server is unreachable from one step to another; without ``end`` until the run has ended, which is then synced."""

    def inject(bench: FaultBench) -> Job:
        if begin == 0:
            bench.server.go()
        job = bench.submit(is_online=True)
        if begin:
            job.wait_for_step(begin)
            bench.server.go()
        if end is not None:
            job.wait_for_step(end)
        else:
            job.wait_until_ended()
        bench.server.come()
        if end is None:
            bench.sync(job)
        return job

    return inject


def random_kills(*arguments: str) -> Injector:
    """SIGKILL of 20 random processes of the job, every second one while it trains, the others also while it starts.

    Candidates are agents, ranks, DataLoader workers, W&B's service, srun, and the commands of the batch script between
    attempts. The batch script itself is not: with it, Slurm ends the job.
    """

    def inject(bench: FaultBench) -> Job:
        generator = random.Random(1)
        slower = ("--trainer.callbacks.seconds=0.5", "--checkpoint.every_n_steps", "5", "--data.num_workers", "1")
        job = bench.submit(*slower, *arguments)
        kills = 0
        while kills < 20 and job.is_active():
            if kills % 2:
                job.wait_for_progress()
            time.sleep(generator.uniform(0, 8))
            if processes := job.processes():
                pid, name = generator.choice(processes)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
                    print(f"  kill {kills}: {name}", file=sys.stderr)
        if kills < 20:
            status = job.status()
            raise SystemExit(f"only {kills} processes were killed before the run ended: {status['state']}. {status['message']}")
        return job

    return inject
