"""The store of the ranks listens where it must, and nothing that a rank sends is executed."""

import os
import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.checkpoint import Checkpoint, Manifest, Progress
from lockstep.core import FinalTestError, LockstepError, PeerError, RunError, SaveError, Superseded, UsageError, World
from lockstep.distributed import broadcast, broadcast_from_rank_zero, destroy_process_group, fork_ranks, init_process_group
from lockstep.distributed.process_group import all_gather, listen
from lockstep.runs import Run

SECONDS = timedelta(seconds=30)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize(
    ("address", "nodes", "elsewhere"), [("127.0.0.2", 2, False), ("localhost", 1, False), ("localhost", 2, True)]
)
def test_the_store_listens_on_the_interface_of_its_address(address: str, nodes: int, elsewhere: bool) -> None:
    port = free_port()

    def meet(world: World) -> tuple[bool, list[int]]:
        init_process_group(replace(world, rendezvous=f"tcp://{address}:{port}"), torch.device("cpu"), SECONDS)
        found = answers("127.0.0.3", port)
        ranks = all_gather(world.rank, world)
        destroy_process_group()
        return found, ranks

    assert fork_ranks(meet, nodes, 2 // nodes) == [(elsewhere, [0, 1])] * 2


def test_an_address_of_another_machine_means_all_interfaces() -> None:
    """Behind a translated address, rank zero has no interface with it."""
    with listen("192.0.2.1", free_port(), 2) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_a_port_in_use_is_an_error() -> None:
    with listen("127.0.0.2", 0, 1) as first, pytest.raises(OSError, match="in use"):
        listen("127.0.0.2", first.getsockname()[1], 1)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("collective", ["broadcast", "all_gather"])
def test_what_a_rank_sends_is_not_executed(tmp_path: Path, collective: str) -> None:
    def attack(world: World) -> str:
        init_process_group(world, torch.device("cpu"), SECONDS)
        value: Any = Payload(tmp_path / "executed") if world.rank == 0 else None
        try:
            _ = broadcast(value) if collective == "broadcast" else all_gather(value, world)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    said = fork_ranks(attack, 1, 2)[1]
    assert not (tmp_path / "executed").exists()
    if collective == "broadcast":
        assert said.startswith("RunError: broadcast: an object of posix.mkdir is not accepted from another rank; send")
    assert said


@pytest.mark.parametrize("error", [LockstepError, UsageError, RunError, SaveError, PeerError, FinalTestError, Superseded])
def test_every_error_of_rank_zero_is_raised_on_the_other_ranks(error: type[LockstepError]) -> None:
    def exchange(world: World) -> str:
        init_process_group(world, torch.device("cpu"), SECONDS)

        def fail() -> None:
            raise error("the cause")

        with pytest.raises(LockstepError) as raised:
            broadcast_from_rank_zero(fail, world)
        destroy_process_group()
        return repr(raised.value)

    assert fork_ranks(exchange, 1, 2) == [f"{error.__name__}('the cause')"] * 2


def test_runs_and_checkpoints_are_sent(tmp_path: Path) -> None:
    progress = Progress(1, 2, 3, 4, 0.5, 0.0, 1e9, ["a", "b"])
    found = Checkpoint(tmp_path, Manifest(progress, 2, 1, 1e9, {"model.ckpt": (3, "ab")}))

    def exchange(world: World) -> Any:
        init_process_group(world, torch.device("cpu"), SECONDS)
        run = broadcast_from_rank_zero(lambda: (Run(tmp_path), 3), world)
        checkpoint = broadcast_from_rank_zero(lambda: found, world, (Checkpoint, Manifest, Progress))
        skipped = all_gather({"a.jpg"}, world)
        destroy_process_group()
        return run, checkpoint, skipped

    assert fork_ranks(exchange, 1, 2) == [((Run(tmp_path), 3), found, [{"a.jpg"}] * 2)] * 2
