"""The process group: rendezvous, and small collectives of Python objects."""

import errno
import logging
import pickle
import re
import socket
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from datetime import timedelta
from pathlib import Path, PosixPath
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins import ClusterEnvironment
from torch.serialization import safe_globals

from lockstep.compat.lightning import set_rank_zero
from lockstep.compat.torch import flight_record
from lockstep.core import (
    FinalTestError,
    LockstepError,
    PeerError,
    RunError,
    SaveError,
    StorageError,
    Superseded,
    UsageError,
    World,
    atomic_write,
)
from lockstep.distributed.cpus import set_threads
from lockstep.runs import Run

log = logging.getLogger(__name__)

T = TypeVar("T")

_NO_LIMIT = timedelta(days=365)
"""The timeout of collectives whose callers have their own limits."""

_SAFE_TYPES = (
    PosixPath,
    Run,
    LockstepError,
    UsageError,
    RunError,
    SaveError,
    PeerError,
    StorageError,
    FinalTestError,
    Superseded,
)
"""Classes that a rank accepts from another one, besides those that ``torch.load(weights_only=True)`` accepts."""


class WorldEnvironment(ClusterEnvironment):
    """Describes a ``World`` to Lightning, in place of Lightning's own detection of Slurm and torchrun."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        return self._world.environ().get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(self._world.environ().get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world.size

    def set_world_size(self, size: int) -> None:
        assert size == self._world.size, (size, self._world)

    def global_rank(self) -> int:
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self._world.rank, (rank, self._world)

    def local_rank(self) -> int:
        return self._world.local_rank

    def node_rank(self) -> int:
        return self._world.node_rank


def init_process_group(
    world: World, device: torch.device, timeout: timedelta, alone: bool = False, backend: str = "auto"
) -> None:
    """Start the process group; for a single rank only if ``alone``.

    A collective fails after waiting ``timeout`` for another rank. The ``backend`` auto is nccl on GPUs, gloo on CPUs.
    """
    set_rank_zero(world.rank)
    if world.size == 1 and not alone:
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    set_threads(on_gpu, world.local_size)
    if backend == "auto":
        backend = "nccl" if on_gpu else "gloo"
    store = _make_store(world, timeout)
    torch.distributed.init_process_group(
        backend=backend,
        init_method=world.rendezvous if store is None else None,
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )


def _make_store(world: World, timeout: timedelta) -> Any:
    """The store through which the ranks meet; None if ``init_method`` creates it, as under torchrun."""
    if world.size == 1:
        return torch.distributed.HashStore()  # type: ignore[attr-defined]
    if not world.rendezvous.startswith("tcp://"):
        return None
    address, port = parse_rendezvous(world.rendezvous)
    listener = world.listener
    if world.is_rank_zero and listener is None:
        listener = listen(address, port, world.nodes).detach()
    tcp_store = torch.distributed.TCPStore  # type: ignore[attr-defined]
    return tcp_store(address, port, world.size, world.is_rank_zero, timeout=timeout, master_listen_fd=listener)


def parse_rendezvous(rendezvous: str) -> tuple[str, int]:
    """Address and port of ``tcp://address:port``."""
    place = re.fullmatch(r"tcp://\[?(.+?)]?:(\d+)", rendezvous)
    assert place is not None, rendezvous
    return place[1], int(place[2])


def listen(address: str, port: int, nodes: int) -> socket.socket:
    """Listen only on the interface with ``address``, to which all others connect: the store has no password.

    A host name may resolve to the loopback interface on its own host; then, with several nodes, listen on all interfaces.
    """
    family, _, _, _, (found, *_) = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    if nodes == 1 or found == address or not str(found).startswith(("127.", "::1")):
        try:
            return socket.create_server((str(found), port), family=family, backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    log.warning("rendezvous: no interface of this node has the address %s; listening on all interfaces", address)
    return socket.create_server(("", port), family=family, backlog=4096)


def enable_flight_recorder(folder: Path, env: MutableMapping[str, str]) -> None:
    """Make NCCL and gloo record their latest collectives; NCCL writes them to ``folder`` when one times out.

    Call this before the process group starts. Variables that are already set in ``env`` keep their values. ``torchfrtrace``
    reads the files (https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html).
    """
    defaults = {"BUFFER_SIZE": "2000", "DUMP_ON_TIMEOUT": "1", "DUMP_TEMP_FILE": str(folder / "nccl-trace-")}
    for name, value in defaults.items():
        env.setdefault(f"TORCH_FR_{name}", value)


def write_flight_record(world: World, env: Mapping[str, str]) -> None:
    """Write the latest collectives of this rank to the folder of ``enable_flight_recorder``.

    NCCL would do so only when a collective times out. The watchdog ends a rank that hangs long before that.
    """
    prefix = env.get("TORCH_FR_DUMP_TEMP_FILE")
    if prefix and (record := flight_record()):
        atomic_write(Path(f"{prefix}{world.rank}"), lambda temporary: temporary.write_bytes(record))


def destroy_process_group() -> None:
    """Destroy the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def broadcast_from_rank_zero(make: Callable[[], T], world: World, types: Sequence[type] = ()) -> T:
    """Call ``make`` on rank zero and return its result on every rank.

    Args:
        types: Classes of the result and its parts, other than numbers, strings, collections, paths and runs.

    Raises:
        LockstepError: ``make`` raised it on rank zero; every rank raises it.
    """
    if world.size == 1:
        return make()
    message: Any = None
    if world.is_rank_zero:
        try:
            message = make()
        except LockstepError as error:
            message = error
    message = broadcast(message, types=types)
    if isinstance(message, LockstepError):
        raise message
    result: T = message
    return result


def broadcast(value: T, source: int = 0, types: Sequence[type] = ()) -> T:
    """Return the ``value`` of the rank ``source`` on every rank.

    Only tensors, numbers, strings, collections and ``types`` are accepted: unpickling anything else could run code that a
    peer chooses.

    Raises:
        RunError: The value has another class.
    """
    message = [value]
    try:
        with safe_globals([*_SAFE_TYPES, *types]):
            torch.distributed.broadcast_object_list(message, src=source, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise RunError(
            f"broadcast: an object of {found[1] if found else 'an unknown class'} is not accepted from another rank; send "
            "tensors, numbers, strings and collections of them, or allow the class with torch.serialization.add_safe_globals."
        ) from error
    return message[0]


def new_group(world: World) -> Any:
    """A gloo group of all ranks for the collectives of one thread, without a timeout; None for a single rank."""
    return torch.distributed.new_group(backend="gloo", timeout=_NO_LIMIT) if world.size > 1 else None


def gather(value: T, world: World, group: Any = None) -> list[T]:
    """Collect the ``value`` of every rank on rank zero, by rank; other ranks get an empty list. Every rank must call this."""
    if world.size == 1:
        return [value]
    values: list[T] | None = [value] * world.size if world.is_rank_zero else None
    torch.distributed.gather_object(value, values, dst=0, group=group, weights_only=True)
    return values or []


def scatter(values: Sequence[T], world: World, group: Any = None) -> T:
    """Return to each rank its item of the ``values`` of rank zero; ignore those of other ranks. Every rank must call this."""
    if world.size == 1:
        return values[0]
    received: list[Any] = [None]
    sent = list(values) if world.is_rank_zero else None
    torch.distributed.scatter_object_list(received, sent, src=0, group=group, weights_only=True)
    result: T = received[0]
    return result


def all_gather(value: T, world: World) -> list[T]:
    """Collect the ``value`` of every rank, by rank: numbers, strings, or collections of them. Every rank must call this."""
    values = [value] * world.size
    if world.size > 1:
        torch.distributed.all_gather_object(values, value, weights_only=True)
    return values
