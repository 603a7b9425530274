"""What is done to a run: each function here makes a function that submits a run to a bench, disturbs it, and returns it."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fault_bench import Bench, Job

Strike = Callable[[Bench], Job]


def kill_rank(rank: int, *arguments: str) -> Strike:
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


def lose(part: str, step: int) -> Strike:
    """A node with all that runs there, or slurmctld, gone for 20 seconds."""

    def strike(bench: Bench) -> Job:
        job = bench.submit()
        job.wait_for_step(step)
        bench.cluster.lose(part)
        time.sleep(20)
        bench.cluster.restore(part)
        return job

    return strike


def preempt(partition: str, *arguments: str) -> Strike:
    """A job of higher priority takes all nodes for some seconds."""

    def strike(bench: Bench) -> Job:
        job = bench.submit("--partition", partition, *arguments)
        job.wait_for_step(57)
        bench.cluster.command(
            "sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"
        )
        return job

    return strike


def out_of_time(*arguments: str) -> Strike:
    """A run three times as long as its time limit."""
    return lambda bench: bench.submit("--time", "1", "--trainer.callbacks.seconds=1.2", *arguments)


def terminate(ranks: tuple[int, ...], pause: float) -> Strike:
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
) -> Strike:
    """Something that a callback does."""
    given = {"what": what, "once": "once" if once else "null", "where": where, "step": step, "rank": rank}
    more = [
        "--trainer.callbacks+=fault_callbacks.FaultCallback",
        *(f"--trainer.callbacks.{name}={value}" for name, value in given.items()),
    ]
    return lambda bench: bench.submit(*arguments, *more)


def damage(how: str) -> Strike:
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
    job = bench.submit("--run.hang_timeout_seconds", "5")
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
    subprocess.run(["pkill", "-KILL", "-P", str(job.ranks()[0]), "wandb-core"], check=True)
    return job


def no_controller_to_submit(bench: Bench) -> Job:
    """slurmctld down for 20 seconds, while the run is submitted."""
    bench.cluster.lose("slurmctld")
    back = threading.Timer(20, bench.cluster.restore, ["slurmctld"])
    back.start()
    job = bench.submit()
    back.join()
    return job


def kill_without_controller(bench: Bench) -> Job:
    """slurmctld down for 20 seconds, and a rank killed meanwhile."""
    job = bench.submit()
    job.wait_for_step(57)
    bench.cluster.lose("slurmctld")
    job.kill(1)
    time.sleep(20)
    bench.cluster.restore("slurmctld")
    return job


def submit_twice(bench: Bench) -> Job:
    """Two more jobs for a run that is being trained: both are refused."""
    job = bench.submit()
    job.wait_for_step(57)
    more = [bench.again(job) for _ in range(2)]
    for other in more:
        told = other.end()
        if told["exit_status"] != 2:
            raise SystemExit(f"a second job of a run was not refused: {told}")
    return job


def kill_at(*steps: int) -> Strike:
    """SIGKILL of one rank after the other."""

    def strike(bench: Bench) -> Job:
        job = bench.submit()
        for number, step in enumerate(steps):
            job.wait_for_step(step)
            job.kill(number)
        return job

    return strike


def change_nodes(bench: Bench) -> Job:
    """Two of four nodes are lost, and come back later."""
    job = bench.submit(nodes="2-4")
    job.wait_for_step(37)
    for node in ("n3", "n4"):
        bench.cluster.lose(node)
    job.wait_for_step(70)
    world = job.status()["progress"]["world_size"]
    for node in ("n3", "n4"):
        bench.cluster.restore(node)
    bench.cluster.command("scontrol", "requeue", job.id)
    job.wait_for_step(90)
    worlds = (4, world, job.status()["progress"]["world_size"])
    if worlds != (4, 2, 4):
        raise SystemExit(f"the run had {worlds} ranks")
    return job


def lose_server(*, begin: int, end: int | None) -> Strike:
    """W&B's server unreachable from one step to another; without ``end`` until the run is over, and then synced."""

    def strike(bench: Bench) -> Job:
        if begin == 0:
            bench.server.go()
        job = bench.submit(online=True)
        if begin:
            job.wait_for_step(begin)
            bench.server.go()
        if end is not None:
            job.wait_for_step(end)
        else:
            job.end()
        bench.server.come()
        if end is None:
            bench.sync(job)
        return job

    return strike


def random_kills(*arguments: str) -> Strike:
    """SIGKILL of a random process of the job, 20 times: every other time while it trains, else also while it starts.

    Ranks, workers of DataLoaders, W&B's service, srun, and what the batch script asks between attempts; not the batch script
    itself, with which Slurm ends the job.
    """

    def strike(bench: Bench) -> Job:
        chance = random.Random(1)
        slower = ("--trainer.callbacks.seconds=0.5", "--checkpoint.every_n_steps", "5", "--data.num_workers", "1")
        job = bench.submit(*slower, *arguments)
        kills = 0
        while kills < 20 and job.status()["exit_status"] == 3:
            if kills % 2:
                job.wait_for_work()
            time.sleep(chance.uniform(0, 8))
            if processes := job.processes():
                pid, name = chance.choice(processes)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
                    print(f"  kill {kills}: {name}", file=sys.stderr)
        if kills < 20:
            raise SystemExit(f"only {kills} processes were killed before the run was over")
        return job

    return strike
