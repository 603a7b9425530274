"""``strategy: ddp``: every rank has the whole model; and a single rank, which needs nobody."""

import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _DDPSink

from lockstep.config import DDPOptions
from lockstep.data import DataSharding
from lockstep.distributed import WorldEnvironment
from lockstep.strategies.base import LockstepStrategy


class SingleDevice(LockstepStrategy, SingleDeviceStrategy):
    """One process: no process group, no wrapper."""

    def __init__(self, device: torch.device, sharding: DataSharding) -> None:
        super().__init__(device=device)
        self.sharding = sharding


class DDP(LockstepStrategy, DDPStrategy):
    """Distributed data parallel: every rank has the whole model, gradients are averaged while backward goes on."""

    def __init__(self, devices: list[torch.device], sharding: DataSharding, options: DDPOptions, timeout: timedelta) -> None:
        hooks: dict[str, Callable[..., Any] | None] = {
            "none": None,
            "bf16": default_hooks.bf16_compress_hook,
            "fp16": default_hooks.fp16_compress_hook,
        }
        super().__init__(
            parallel_devices=devices,
            cluster_environment=WorldEnvironment(sharding.world),
            timeout=timeout,
            static_graph=options.static_graph,
            find_unused_parameters=options.find_unused_parameters,
            bucket_cap_mb=options.bucket_cap_mb,
            gradient_as_bucket_view=options.gradient_as_bucket_view,
        )
        self._hook = hooks[options.gradient_compression]
        self._rebuckets = not options.find_unused_parameters
        self.sharding = sharding

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn == "fit" and self._rebuckets:
            self._restore_bucket_order(trainer)

    def _restore_bucket_order(self, trainer: Trainer) -> None:
        """Sum gradients in the same order after a restart as before it.

        After its first backward, DDP puts gradients into buckets in the order in which they became ready, and so sums them in
        another order from the second step on. That order is noted, saved, and after a restart shown to DDP with gradients of
        zero, so that the first step is already summed as the later ones are.
        """
        model = self.model
        assert isinstance(model, DistributedDataParallel)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.gradient_ready_order is None:
            ready: list[int] = []

            def note(index: int, hook: list[Any]) -> Callable[[Tensor], None]:
                def noted(_: Tensor) -> None:
                    ready.append(index)
                    hook.pop().remove()

                return noted

            for index, parameter in enumerate(parameters):
                hook: list[Any] = []
                hook.append(parameter.register_post_accumulate_grad_hook(note(index, hook)))  # type: ignore[no-untyped-call]
            self.gradient_ready_order = ready
        elif sorted(self.gradient_ready_order) == list(range(len(parameters))):
            for _ in range(2 if model.static_graph else 1):  # a static graph is looked at once before
                model.reducer.prepare_for_forward()
                model.reducer.prepare_for_backward([])
                nothing = torch.zeros((), device=self.root_device)
                for index in reversed(self.gradient_ready_order):  # what was added last has its gradient first
                    nothing = nothing + parameters[index].reshape(-1)[:1].sum() * 0
                (nothing,) = _DDPSink.apply(weakref.ref(model), nothing)
                nothing.backward()
            trainer.lightning_module.zero_grad(set_to_none=True)

    def _register_ddp_hooks(self) -> None:
        # lightning registers hooks on GPUs only; gloo takes them as well.
        if self._hook is not None:
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, self._hook)
