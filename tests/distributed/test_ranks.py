"""Forked ranks without training: their results, and the report about the first one that fails."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support.waiting import wait_until

from lockstep.core.errors import RunError, UsageError
from lockstep.core.world import World
from lockstep.distributed.process_group import all_gather, broadcast_from_rank_zero, destroy_process_group, init_process_group
from lockstep.distributed.ranks import RankFailed, fork_ranks


def test_each_rank_has_its_world() -> None:
    worlds = fork_ranks(lambda world: (world.rank, world.size, world.local_rank, world.node_rank, world.nodes), 2, 2)
    assert worlds == [(0, 4, 0, 0, 2), (1, 4, 1, 0, 2), (2, 4, 0, 1, 2), (3, 4, 1, 1, 2)]


def test_each_rank_has_its_world_in_the_environment() -> None:
    assert fork_ranks(lambda world: World.from_env(os.environ) == world, 2, 2) == [True] * 4


def reduce_over_gloo(world: World) -> int:
    init_process_group(world, torch.device("cpu"), timedelta(seconds=30))
    total = torch.tensor(world.rank)
    torch.distributed.all_reduce(total)
    assert all_gather(world.rank, world) == list(range(world.size))
    assert broadcast_from_rank_zero(lambda: f"from {world.rank}", world) == "from 0"
    destroy_process_group()
    return int(total)


def test_ranks_reduce_over_gloo() -> None:
    assert fork_ranks(reduce_over_gloo, 2, 2) == [6] * 4


def test_an_error_on_rank_zero_is_raised_on_every_rank() -> None:
    def fail(world: World) -> None:
        init_process_group(world, torch.device("cpu"), timedelta(seconds=30))

        def make() -> None:
            raise UsageError("no folder")

        broadcast_from_rank_zero(make, world)

    with pytest.raises(RankFailed) as raised:
        fork_ranks(fail, 1, 2)
    failure = raised.value.failure
    assert (failure.report, failure.exit_status, failure.is_permanent) == ("no folder", 2, True)


def raise_on_two(world: World) -> None:
    """Fail on rank 2; the others wait in a collective that cannot finish."""
    init_process_group(world, torch.device("cpu"), timedelta(minutes=5))
    if world.rank == 2:
        raise ArithmeticError("rank two's own mistake")
    torch.distributed.barrier()


def test_the_rank_that_fails_first_is_named_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed) as raised:
        fork_ranks(raise_on_two, 2, 2)
    failure = raised.value.failure
    assert (failure.rank, failure.node, failure.exit_status, failure.is_permanent) == (2, 1, 1, False)
    assert "ArithmeticError: rank two's own mistake" in failure.report
    assert failure.report.count("Traceback") == 1
    assert time.monotonic() - start < 20


def kill_one(world: World) -> None:
    init_process_group(world, torch.device("cpu"), timedelta(minutes=5))
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankFailed) as raised:
        fork_ranks(kill_one, 1, 3)
    assert raised.value.failure.rank == 1
    assert "killed by SIGKILL" in raised.value.failure.report


def test_a_killed_rank_is_detected_at_once_while_the_others_are_busy() -> None:
    """Also if a child process of the rank outlives it, as a DataLoader worker does for a while."""

    def busy(world: World) -> None:
        if world.rank == 2:
            if os.fork() == 0:
                time.sleep(8)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(RankFailed) as raised:
        fork_ranks(busy, 1, 4)
    assert raised.value.failure.rank == 2
    assert time.monotonic() - start < 5


def test_the_other_ranks_are_killed_if_they_ignore_sigterm(tmp_path: Path) -> None:
    def stubborn(world: World) -> None:
        (tmp_path / str(world.rank)).write_text(str(os.getpid()))
        if world.rank == 0:
            while not (tmp_path / "1").exists():
                time.sleep(0.01)
            raise RunError("rank zero has enough")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)

    with pytest.raises(RankFailed, match="rank zero has enough"):
        fork_ranks(stubborn, 1, 2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "1").read_text()), 0)


def test_output_of_other_ranks_goes_to_their_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def write_output(world: World) -> None:
        print(f"this is {world.rank}")
        os.system(f"echo shell of {world.rank}")

    fork_ranks(write_output, 1, 2, logs=lambda world: tmp_path / f"{world.rank}.log" if world.rank else None)
    assert "this is 0" in (output := capfd.readouterr().out) and "this is 1" not in output
    assert sorted((tmp_path / "1.log").read_text().splitlines()) == ["shell of 1", "this is 1"]


def test_ranks_end_with_the_parent(tmp_path: Path) -> None:
    def sleep(world: World) -> None:
        (tmp_path / str(world.rank)).write_text(str(os.getpid()))
        time.sleep(60)

    parent = os.fork()
    if parent == 0:
        try:
            fork_ranks(sleep, 1, 2)
        finally:
            os._exit(0)
    while len(list(tmp_path.iterdir())) < 2 or not all(path.read_text() for path in tmp_path.iterdir()):
        time.sleep(0.05)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_rank_that_the_kernel_does_not_end_is_named(
    freezer: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lockstep.distributed.ranks._GRACE_SECONDS", 0.5)
    monkeypatch.setattr("lockstep.distributed.rank_group.STUCK_SECONDS", 0.5)

    def train(world: World) -> None:
        if world.rank == 1:
            (freezer / "cgroup.procs").write_text("0")
            (freezer / "freezer.state").write_text("FROZEN")
        wait_until(lambda: (freezer / "freezer.state").read_text() == "FROZEN\n", 30)
        raise ArithmeticError

    with pytest.raises(RankFailed, match="rank 0 of 2"):
        fork_ranks(train, 1, 2)
    assert re.fullmatch(
        r"lockstep: the kernel does not end rank 1 \(process \d+\) on \S+, which .* Ctrl-C ends the wait for it.\n",
        capfd.readouterr().err,
    )
