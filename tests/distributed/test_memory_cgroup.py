"""Ranks over their limit of memory: the files of both versions of cgroups, then a real one, made by hand where root may."""

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lockstep.core.world import World
from lockstep.distributed.memory_cgroup import MemoryCgroup, MemoryWatch
from lockstep.distributed.ranks import RankFailed, fork_ranks
from lockstep.runs import Failure

TABLES = {1: "9:name=systemd:/\n4:memory:/slurm/job_7\n0::/\n", 2: "0::/slurm/job_7\n"}
NAMES = {1: ("memory", "memory.oom_control", "memory.limit_in_bytes"), 2: (".", "memory.events", "memory.max")}


@pytest.mark.parametrize("version", [1, 2])
def test_the_nearest_limit_and_the_kills_are_read(tmp_path: Path, version: int) -> None:
    folder, events, limit = NAMES[version]
    root = tmp_path / folder
    job = root / "slurm/job_7"
    cgroup = MemoryCgroup.of_this_process(TABLES[version], tmp_path)
    assert (cgroup.count_kills(), cgroup.limit) == (0, None)
    job.mkdir(parents=True)
    (job / events).write_text("under_oom 0\noom_kill 3\n")
    (job / limit).write_text("9223372036854771712\n" if version == 1 else "max\n")
    watch = MemoryWatch(cgroup)
    assert (cgroup.count_kills(), cgroup.limit, watch.has_killed) == (3, None, False)
    assert str(watch) == "the machine is out of memory"
    (root / "slurm" / limit).write_text(f"{200 << 20}\n")
    (job / events).write_text("under_oom 0\noom_kill 4\n")
    assert watch.has_killed and str(watch) == "the job, which may use 200 MiB on this node, is out of memory"


def test_a_machine_without_cgroups_has_no_limit(tmp_path: Path) -> None:
    cgroup = MemoryCgroup.of_this_process("", tmp_path)
    assert (cgroup.count_kills(), cgroup.limit) == (0, None)


@pytest.fixture
def limited() -> Iterator[Path]:
    """The file cgroup.procs of a new cgroup of at most 100 MiB."""
    root = Path("/sys/fs/cgroup")
    parent = root / "memory" if (root / "memory").is_dir() else root
    folder = parent / f"lockstep-test-{os.getpid()}"
    try:
        folder.mkdir()
        name = "memory.max" if parent == root else "memory.limit_in_bytes"
        (folder / name).write_text(str(100 << 20))
        if (swap := folder / ("memory.swap.max" if parent == root else "memory.memsw.limit_in_bytes")).exists():
            swap.write_text("0" if parent == root else str(100 << 20))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no cgroup with a limit of memory can be made here ({error})")
    yield folder / "cgroup.procs"
    folder.rmdir()


def eat(world: World) -> None:
    """Use memory without end on rank 1."""
    blocks = []
    while world.rank == 1:
        blocks.append(bytearray(os.urandom(1 << 20)))


def eat_in_worker(world: World) -> None:
    from torch.utils.data import DataLoader

    if world.rank == 1:
        list(DataLoader(Eaters(), num_workers=1))  # type: ignore[arg-type]


class Eaters:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        eat(World(1, 2, 1, 2))
        return index


@pytest.mark.parametrize(
    ("target", "first"),
    [
        (eat, "The process was killed by SIGKILL: the job, which may use 100 MiB on this node, is out of memory;"),
        (
            eat_in_worker,
            "exited unexpectedly. The kernel killed it: the job, which may use 100 MiB on this node, is out of memory",
        ),
    ],
)
def test_a_rank_that_the_kernel_kills_is_named_with_its_memory(limited: Path, target: object, first: str) -> None:
    ours, theirs = multiprocessing.Pipe()

    def run(sender: Connection) -> None:
        limited.write_text(str(os.getpid()))
        try:
            fork_ranks(target, 1, 2)  # type: ignore[arg-type]
        except RankFailed as failed:
            sender.send(failed.failure)

    process = multiprocessing.get_context("fork").Process(target=run, args=(theirs,))
    process.start()
    process.join(60)
    failure = ours.recv() if ours.poll() else None
    assert isinstance(failure, Failure) and failure.is_out_of_memory and failure.rank == 1
    assert first in failure.report, failure.report
