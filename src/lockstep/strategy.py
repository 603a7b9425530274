"""How the ranks work together: which device each has, how they meet, and what they do with gradients and data."""

import logging
import os
import weakref
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _DDPSink
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lockstep.errors import LockstepError, UsageError
from lockstep.options import DDPOptions
from lockstep.order import GlobalBatches, Later, Position, Sharding, mix
from lockstep.world import World

log = logging.getLogger(__name__)

T = TypeVar("T")


class WorldEnvironment(ClusterEnvironment):
    """Tells lightning what ``World`` knows; with it lightning's own detection of Slurm and torchrun stays out of the way."""

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


def devices_of_node(world: World, accelerator: str) -> list[torch.device]:
    """One device for each rank of this node.

    Args:
        world: How many ranks share the node.
        accelerator: As in lightning's Trainer; ``auto`` takes GPUs where every rank can have one, else the CPU.

    Raises:
        UsageError: There are fewer GPUs than ranks, or the accelerator is not one that lockstep drives.
    """
    visible = torch.cuda.device_count()
    # A cluster that gives each task its own GPU shows each of them as number 0.
    bound = visible == 1 and world.launcher in ("slurm", "submitit")
    if accelerator == "auto":
        accelerator = "gpu" if bound or visible >= world.local_size else "cpu"
        if visible and accelerator == "cpu" and world.is_zero:
            log.warning("%d ranks on this node, but %d GPUs are visible: training on the CPU", world.local_size, visible)
    if accelerator == "cpu":
        return [torch.device("cpu")] * world.local_size
    if accelerator not in ("gpu", "cuda"):
        raise UsageError(f"trainer.accelerator: {accelerator!r} is not valid; valid are auto, cpu, gpu and cuda.")
    if bound:
        return [torch.device("cuda", 0)] * world.local_size
    if visible < world.local_size:
        raise UsageError(
            f"{world.local_size} ranks on this node, but only {visible} GPUs are visible; "
            "use fewer ranks or --trainer.accelerator cpu."
        )
    return [torch.device("cuda", index) for index in range(world.local_size)]


def join(world: World, device: torch.device, timeout: timedelta) -> None:
    """Meet the other ranks: start the process group (nccl on GPUs, gloo on CPUs). A single process has none."""
    # lightning guesses it from the environment when it is imported, which is too early for a forked rank.
    rank_zero_only.rank = world.rank  # type: ignore[attr-defined]
    if world.size == 1:
        return
    on_gpu = device.type == "cuda"
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        # As torchrun does: the ranks of a node share its cores. The variable too, or lightning sets cores / ranks of the node,
        # and the last digit of a sum depends on how the ranks are spread over nodes.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        backend="nccl" if on_gpu else "gloo",
        init_method=world.rendezvous,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )


def trace_collectives(folder: Path, env: MutableMapping[str, str]) -> None:
    """Have NCCL remember its newest collectives, and write them into ``folder`` when one of them takes too long.

    ``torchfrtrace`` reads the files (https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html). What a user
    has set stays. To be called before the process group starts.
    """
    wanted = {"BUFFER_SIZE": "2000", "DUMP_ON_TIMEOUT": "1", "DUMP_TEMP_FILE": str(folder / "nccl-trace-")}
    for name, value in wanted.items():
        env.setdefault(f"TORCH_FR_{name}", value)


def leave() -> None:
    """End the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Ordered(Strategy):
    """What every lockstep strategy does with data: each loader goes in the run's order, and an uneven last batch counts
    each of its samples alike."""

    sharding: Sharding
    position: Position | None = None
    ready_order: list[int] | None = None

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        # All ranks have drawn the same weights; from here on each draws its own dropout. Not earlier: setting up the process
        # group, lightning seeds every rank alike.
        torch.manual_seed(mix(self.sharding.seed, self.sharding.world.rank) >> 1)

    def process_dataloader(self, dataloader: object) -> object:
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        owner = type(getattr(trainer, "datamodule", None) or self.lightning_module).__name__
        ordered = self.sharding.in_order(dataloader, owner)
        position = self.position
        if not (isinstance(ordered, DataLoader) and isinstance(ordered.batch_sampler, GlobalBatches)):
            return Later(ordered, position.batch) if position else ordered
        # Now: lightning tells the epoch only after workers have begun to fetch.
        if position:
            ordered.batch_sampler.order.set_epoch(position.epoch)
            ordered.batch_sampler.start = (position.epoch, position.batch)
        elif trainer is not None:
            ordered.batch_sampler.order.set_epoch(trainer.current_epoch)
        return ordered

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        weight = self._batch_weight()
        return super().backward(closure_loss if weight == 1 else closure_loss * weight, optimizer, *args, **kwargs)

    def _batch_weight(self) -> float:
        module = self.lightning_module
        if module is None or self.sharding.world.size == 1:
            return 1.0
        loader = module.trainer.train_dataloader
        batches = getattr(loader, "batch_sampler", None)
        return batches.weight(module.trainer.fit_loop.batch_idx) if isinstance(batches, GlobalBatches) else 1.0


class SingleDevice(_Ordered, SingleDeviceStrategy):
    """One process: no process group, no wrapper."""

    def __init__(self, device: torch.device, sharding: Sharding) -> None:
        super().__init__(device=device)
        self.sharding = sharding


class DDP(_Ordered, DDPStrategy):
    """Distributed data parallel: every rank has the whole model, gradients are averaged while backward goes on."""

    def __init__(self, devices: list[torch.device], sharding: Sharding, options: DDPOptions) -> None:
        hooks: dict[str, Callable[..., Any] | None] = {
            "none": None,
            "bf16": default_hooks.bf16_compress_hook,
            "fp16": default_hooks.fp16_compress_hook,
        }
        super().__init__(
            parallel_devices=devices,
            cluster_environment=WorldEnvironment(sharding.world),
            timeout=timedelta(minutes=options.timeout_minutes),
            static_graph=options.static_graph,
            find_unused_parameters=options.find_unused_parameters,
            bucket_cap_mb=options.bucket_mb,
            gradient_as_bucket_view=options.bucket_view,
        )
        self._hook = hooks[options.gradient_compression]
        self._rebuckets = not options.find_unused_parameters
        self.sharding = sharding

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn == "fit" and self._rebuckets:
            self._keep_buckets(trainer)

    def _keep_buckets(self, trainer: Trainer) -> None:
        """Sum gradients in the same order after a restart as before it.

        After its first backward, DDP puts gradients into buckets in the order in which they became ready, and so sums them in
        another order from the second step on. That order is noted, saved, and after a restart shown to DDP with gradients of
        zero, so that the first step is already summed as the later ones are.
        """
        model = self.model
        assert isinstance(model, DistributedDataParallel)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.ready_order is None:
            ready: list[int] = []

            def note(index: int, hook: list[Any]) -> Callable[[Tensor], None]:
                def noted(_: Tensor) -> None:
                    ready.append(index)
                    hook.pop().remove()

                return noted

            for index, parameter in enumerate(parameters):
                hook: list[Any] = []
                hook.append(parameter.register_post_accumulate_grad_hook(note(index, hook)))  # type: ignore[no-untyped-call]
            self.ready_order = ready
        elif sorted(self.ready_order) == list(range(len(parameters))):
            for _ in range(2 if model.static_graph else 1):  # a static graph is looked at once before
                model.reducer.prepare_for_forward()
                model.reducer.prepare_for_backward([])
                nothing = torch.zeros((), device=self.root_device)
                for index in reversed(self.ready_order):  # what was added last has its gradient first
                    nothing = nothing + parameters[index].reshape(-1)[:1].sum() * 0
                (nothing,) = _DDPSink.apply(weakref.ref(model), nothing)
                nothing.backward()
            trainer.lightning_module.zero_grad(set_to_none=True)

    def _register_ddp_hooks(self) -> None:
        # lightning registers hooks on GPUs only; gloo takes them as well.
        if self._hook is not None:
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, self._hook)


def make_strategy(name: str, ddp: DDPOptions, devices: list[torch.device], sharding: Sharding) -> SingleDevice | DDP:
    """The strategy called ``name`` in the config, for this rank.

    A world of one needs no strategy: whatever is named, it trains on its one device.
    """
    if name != "ddp":
        raise UsageError(f"strategy: {name!r} is not known; valid is 'ddp'.")
    if sharding.world.size == 1:
        return SingleDevice(devices[0], sharding)
    return DDP(devices, sharding, ddp)


def from_rank_zero(make: Callable[[], T], world: World) -> T:
    """What ``make`` returns on rank zero, on every rank; its ``LockstepError`` is raised on every rank too."""
    if world.size == 1:
        return make()
    message: list[Any] = [None]
    if world.is_zero:
        try:
            message = [make()]
        except LockstepError as error:
            message = [error]
    torch.distributed.broadcast_object_list(message, src=0)
    if isinstance(message[0], LockstepError):
        raise message[0]
    made: T = message[0]
    return made


def on_all_ranks(value: T, world: World) -> list[T]:
    """The ``value`` of every rank, by rank; every rank must call."""
    values = [value] * world.size
    if world.size > 1:
        torch.distributed.all_gather_object(values, value)
    return values
