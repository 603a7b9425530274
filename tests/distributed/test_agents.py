"""Agents of several nodes on this machine, without Slurm and without training: who is restarted, named, ended and refused."""

import multiprocessing
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from support.waiting import wait_until

from lockstep.core import World
from lockstep.distributed import Agent, Channel, Plan, init_process_group
from lockstep.runs import LOST_AGENT, Failure

pytestmark = pytest.mark.timeout(60)

Train = Callable[[World, int, Callable[[str], None]], Any]

SECONDS = timedelta(seconds=30)


@dataclass
class Nodes:
    """Agents in processes of their own; what they record goes to files in ``folder``."""

    folder: Path
    train: Train
    nodes: int = 2
    ranks: int = 2
    attempts: int = 2
    limits: dict[str, float] = field(default_factory=dict)
    silent_seconds: float = 60.0
    agents: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]

    def start(self, *which: int) -> "Nodes":
        for node in which or range(self.nodes):
            self.agents.append(multiprocessing.get_context("fork").Process(target=self.run, args=(node,)))
            self.agents[-1].start()
        return self

    def run(self, node: int, key: bytes = b"secret") -> None:
        agents = World(node, self.nodes, 0, 1, f"tcp://127.0.0.1:{self.port}", "slurm")
        plan = Plan(self.train, self.log, self.limits, self.record, self.next_attempt)
        status = Agent(agents, self.ranks, Channel.open(agents, key, self.silent_seconds), plan).run(1)
        sys.stderr.flush()
        os._exit(status)  # as a task of Slurm does: it waits for no child

    def log(self, world: World, attempt: int) -> Path:
        return self.folder / f"{attempt}.{world.rank}.log"

    def record(self, attempt: int, failure: Failure) -> None:
        failure.write(self.folder / f"{attempt}.failure.json")

    def next_attempt(self, status: int) -> int | None:
        ended = len(list(self.folder.glob("next.*"))) + 1
        (self.folder / f"next.{ended}").write_text(str(status))
        return ended + 1 if ended < self.attempts else None

    def failure(self, attempt: int) -> Failure:
        failure = Failure.read(self.folder / f"{attempt}.failure.json")
        assert failure is not None
        return failure

    def statuses(self) -> list[int]:
        """Exit statuses of the agents, once all have ended."""
        # Not join: it waits for a pipe that a frozen rank keeps open.
        wait_until(lambda: all(agent.exitcode is not None for agent in self.agents), 40)
        return [agent.exitcode for agent in self.agents]


def note(folder: Path, world: World, attempt: int) -> None:
    (folder / f"{attempt}.{world.rank}.pid").write_text(f"{os.getpid()} {os.getppid()}")


def reduce(world: World) -> None:
    init_process_group(world, torch.device("cpu"), SECONDS)
    total = torch.tensor(world.rank)
    torch.distributed.all_reduce(total)
    assert int(total) == world.size * (world.size - 1) // 2


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_a_killed_rank_is_named_and_all_ranks_start_again_from_the_same_agents(tmp_path: Path) -> None:
    def train(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        note(tmp_path, world, attempt)
        reduce(world)
        if attempt == 1 and world.rank == 3:
            if (child := os.fork()) == 0:  # as a DataLoader worker
                time.sleep(100)
            (tmp_path / "child").write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.barrier()

    nodes = Nodes(tmp_path, train).start()
    assert nodes.statuses() == [0, 0]
    failure = nodes.failure(1)
    assert (failure.rank, failure.node, failure.is_killed, failure.report) == (3, 1, True, "The process was killed by SIGKILL.")
    assert not is_alive(int((tmp_path / "child").read_text()))
    pids = {path.name: path.read_text().split() for path in tmp_path.glob("*.pid")}
    assert len(pids) == 8 and len({pid for pid, _ in pids.values()}) == 8
    for rank in range(4):
        assert pids[f"1.{rank}.pid"][1] == pids[f"2.{rank}.pid"][1] == str(nodes.agents[rank // 2].pid)


def test_the_cause_is_told_and_not_the_lost_connections(tmp_path: Path) -> None:
    def train(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        reduce(world)
        if world.rank == 2:
            raise ArithmeticError("rank two's own mistake")
        torch.distributed.barrier()

    nodes = Nodes(tmp_path, train, attempts=1).start()
    assert nodes.statuses() == [1, 0]
    assert nodes.failure(1).rank == 2 and "rank two's own mistake" in nodes.failure(1).report
    assert (tmp_path / "next.1").read_text() == "1"


def test_a_rank_that_ignores_sigterm_is_killed_before_the_next_attempt(tmp_path: Path) -> None:
    def train(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        note(tmp_path, world, attempt)
        if attempt == 1 and world.rank == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (tmp_path / "ready").touch()
            time.sleep(100)
        if attempt == 1 and world.rank == 0:
            wait_until((tmp_path / "ready").exists, 30)
            raise ArithmeticError
        assert not is_alive(int((tmp_path / "1.1.pid").read_text().split()[0]))

    nodes = Nodes(tmp_path, train, nodes=1).start()
    assert nodes.statuses() == [0]


@pytest.mark.parametrize("node", [0, 1])
def test_a_rank_that_the_kernel_does_not_end_is_named_and_needs_another_srun(
    tmp_path: Path, freezer: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], node: int
) -> None:
    stuck = 2 * node + 1
    for name, seconds in (("_CLOSING_SECONDS", 2.0), ("STUCK_SECONDS", 1.0)):
        monkeypatch.setattr(f"lockstep.distributed.rank_group.{name}", seconds)

    def train(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        note(tmp_path, world, attempt)
        if world.rank == stuck:
            (freezer / "cgroup.procs").write_text("0")
            (freezer / "freezer.state").write_text("FROZEN")
        wait_until(lambda: (freezer / "freezer.state").read_text() == "FROZEN\n", 30)
        if world.rank == 2 - 2 * node:
            raise ArithmeticError
        time.sleep(100)

    nodes = Nodes(tmp_path, train).start()
    assert nodes.statuses() == [1, 0]
    assert nodes.failure(1).rank == 2 - 2 * node and not list(tmp_path.glob("next.*"))  # the batch script decides
    process = f"rank {stuck} (process {(tmp_path / f'1.{stuck}.pid').read_text().split()[0]}) on {platform.node()}"
    assert capfd.readouterr().err == (
        f"lockstep: the kernel does not end {process}, which may wait for a device or a file system. "
        "The ranks are not restarted without srun.\n"
    )


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_one_agent_the_others_end_with_their_ranks(tmp_path: Path, node: int, number: signal.Signals) -> None:
    def train(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        note(tmp_path, world, attempt)
        time.sleep(100)

    nodes = Nodes(tmp_path, train, silent_seconds=60.0 if number == signal.SIGKILL else 3.0).start()
    wait_until(lambda: len(list(tmp_path.glob("1.*.pid"))) == 4 and all(p.read_text() for p in tmp_path.glob("*.pid")), 30)
    os.kill(nodes.agents[node].pid, number)
    nodes.agents[1 - node].join(40)
    assert nodes.agents[1 - node].exitcode == (1 if number == signal.SIGSTOP and node else LOST_AGENT)
    if number == signal.SIGSTOP:  # else srun names the agent
        what = f"(node {node}, {platform.node()}): its agent has not answered for 3 s: it is stopped, or its node hangs."
        assert nodes.failure(1).reason == f"rank {2 * node} {what}"
    nodes.agents[node].kill()  # as Slurm does when another task has failed
    pids = [int(path.read_text().split()[0]) for path in tmp_path.glob("*.pid")]
    wait_until(lambda: not any(map(is_alive, pids)), 20)
    assert not list(tmp_path.glob("next.*"))  # the batch script decides


def test_after_a_signal_of_slurm_nothing_is_started_again(tmp_path: Path) -> None:
    def train(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        note(tmp_path, world, attempt)
        time.sleep(100)

    nodes = Nodes(tmp_path, train).start()
    wait_until(lambda: len(list(tmp_path.glob("1.*.pid"))) == 4, 30)
    for agent in nodes.agents:
        os.kill(agent.pid, signal.SIGTERM)
    assert nodes.statuses() == [143, 0]
    assert nodes.failure(1).is_interruption and not list(tmp_path.glob("next.*"))


def test_the_rank_that_hangs_before_its_first_step_is_named_with_its_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep.distributed.agent._SECONDARY_SECONDS", 0.2)

    def load_the_corrupt_archive(world: World) -> None:
        time.sleep(100)

    def train(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        reduce(world)
        time.sleep(4.0 * (world.rank == 1))  # it enters the phase when the others are already overdue
        enter("data")
        if world.rank == 1:
            load_the_corrupt_archive(world)
        torch.distributed.barrier()

    nodes = Nodes(tmp_path, train, attempts=1, limits={"data": 1.0}).start()
    assert nodes.statuses() == [1, 0]
    failure = nodes.failure(1)
    assert failure.rank == 1 and "in load_the_corrupt_archive" in failure.report
    assert "It hangs: no progress for" in failure.reason and "in the phase 'data', before the first step. If" in failure.reason


def test_an_agent_that_cannot_fork_ends_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork, forks = os.fork, []

    def limited() -> int:
        forks.append(1)
        if len(forks) > 3:  # the two agents, and the first rank of each
            raise BlockingIOError("Resource temporarily unavailable")
        return fork()

    def train(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        note(tmp_path, world, attempt)
        time.sleep(100)

    monkeypatch.setattr(os, "fork", limited)
    statuses = Nodes(tmp_path, train).start().statuses()
    assert 0 not in statuses
    assert not any(is_alive(int(path.read_text().split()[0])) for path in tmp_path.glob("*.pid"))


def test_agents_wait_for_one_that_imports_longer_than_an_agent_may_be_silent(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, lambda world, attempt, enter: reduce(world), nodes=3, ranks=1, silent_seconds=1.5).start(0, 1)
    time.sleep(4)
    nodes.start(2)
    assert nodes.statuses() == [0, 0, 0]


def test_ranks_that_an_agent_has_killed_are_not_blamed(tmp_path: Path) -> None:
    def train(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        reduce(world)
        if world.rank == 0:
            raise RuntimeError("Connection closed by peer")  # as if a rank of a lost node were gone
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(100)

    nodes = Nodes(tmp_path, train, nodes=1, attempts=1).start()
    assert nodes.statuses() == [1]
    assert (nodes.failure(1).rank, nodes.failure(1).is_secondary) == (0, True)


def test_a_stranger_is_refused(tmp_path: Path) -> None:
    def train(world: World, attempt: int, enter: Callable[[str], None]) -> None:
        reduce(world)

    nodes = Nodes(tmp_path, train, nodes=3, ranks=1).start(0)

    def intrude(answer: bytes) -> bytes:
        def connect() -> socket.socket | None:
            with suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", nodes.port), 20)
            return None

        connected = wait_until(connect, 20)
        assert connected is not None
        with connected:
            assert b"#CHALLENGE#" in connected.recv(1000)
            connected.sendall(answer)
            return connected.recv(1000)

    assert b"#FAILURE#" in intrude(b"\0\0\0\5{ha!}")
    assert intrude(b"") == b""  # says nothing, and is dropped
    nodes.start(1, 2)
    assert nodes.statuses() == [0, 0, 0]
