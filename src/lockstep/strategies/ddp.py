"""``strategy: ddp``: every rank holds the whole model; a single rank trains without a process group."""

import logging
import re
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from lockstep.compat.torch import replay_backward
from lockstep.config import DDPOptions
from lockstep.core import RunError, UsageError
from lockstep.data import DataSharding
from lockstep.distributed import WorldEnvironment
from lockstep.strategies.base import LockstepStrategy
from lockstep.strategies.sync_batchnorm import run_on_cpu as run_sync_batchnorm_on_cpu

log = logging.getLogger(__name__)


class SingleDevice(LockstepStrategy, SingleDeviceStrategy):
    """One rank: no process group, no wrapper around the module."""

    def __init__(self, device: torch.device, sharding: DataSharding) -> None:
        super().__init__(device=device)
        self.sharding = sharding

    def setup_environment(self) -> None:
        super().setup_environment()
        # Lightning does so on several ranks: what ``setup`` and ``configure_model`` draw must not depend on their number.
        reset_seed()


class DDP(LockstepStrategy, DDPStrategy):
    """Distributed data parallel: every rank holds the whole model; gradients are averaged during backward."""

    def __init__(self, devices: list[torch.device], sharding: DataSharding, options: DDPOptions, timeout: timedelta) -> None:
        super().__init__(
            parallel_devices=devices,
            cluster_environment=WorldEnvironment(sharding.world),
            timeout=timeout,
            static_graph=options.static_graph,
            find_unused_parameters=options.find_unused_parameters,
            bucket_cap_mb=options.bucket_cap_mb,
            gradient_as_bucket_view=options.gradient_as_bucket_view,
        )
        self.sharding, self.options = sharding, options

    def setup(self, trainer: Trainer) -> None:
        """Set up, and sum gradients in the same order after a restart as before it.

        After its first backward pass, DDP sorts gradients into buckets by the order in which they became ready, which changes
        the order of summation from the second step on. That order is recorded and saved. After a restart a backward pass of
        zeros repeats it, so that the first step already uses the final buckets.
        """
        super().setup(trainer)
        if trainer.state.fn == "fit":
            self._order_gradients()

    def _order_gradients(self) -> None:
        if self.options.find_unused_parameters:
            return
        assert isinstance(self.model, DistributedDataParallel)
        trainable = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        parameters, order, point = list(trainable.values()), self.gradient_ready_order, self._resume_point
        if point is not None and list(trainable) != point.shared["trainable"]:
            return  # the flags of the parameters are not restored yet; after that, DDP wraps them again
        if point is not None and order and sorted(order) == list(range(len(parameters))):
            gradients = [parameter.grad for parameter in parameters]  # accumulated ones, which are restored
            self.module.zero_grad(set_to_none=True)
            replay_backward(self.model, [parameters[index] for index in order])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        else:
            self.gradient_ready_order = _record_ready_order(parameters)
        self._resume_point = None

    def on_unfrozen(self, names: Sequence[str]) -> None:
        """Wrap the module again: DDP reduces only the gradients of parameters that required one when it wrapped them."""
        if self.options.static_graph:
            raise UsageError(f"ddp.static_graph: {names[0]} begins to require a gradient during training; set it to false.")
        assert isinstance(self.model, DistributedDataParallel)
        log.info("%d parameters begin to require a gradient, first %s; DDP reduces them too", len(names), names[0])
        self.model = self.model.module
        self.configure_ddp()
        self._order_gradients()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if "Expected to have finished reduction in the prior iteration" not in str(error):
                raise
            found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            unused = ", ".join(self._reduced[int(index)] for index in found[1].split()[:3]) if found else "some"
            raise RunError(
                f"The loss of the last step did not use all parameters ({unused} …): freeze those that no step uses, or set "
                "ddp.find_unused_parameters to true."
            ) from error

    def configure_ddp(self) -> None:
        if self.root_device.type == "cpu":
            run_sync_batchnorm_on_cpu(self.module)
        super().configure_ddp()
        self._reduced = [name for name, p in self.module.named_parameters() if p.requires_grad]
        if (name := self.options.gradient_compression) != "none":  # not ``ddp_comm_hook=``, which Lightning ignores on CPUs
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, getattr(default_hooks, f"{name}_compress_hook"))


def _record_ready_order(parameters: list[torch.nn.Parameter]) -> list[int]:
    """A list to which the next backward pass appends the indices of ``parameters``, as their gradients become ready."""
    order: list[int] = []
    handles: dict[int, Any] = {}

    def record(index: int, _: Tensor) -> None:
        order.append(index)
        handles.pop(index).remove()

    for index, parameter in enumerate(parameters):
        hook = partial(record, index)
        handles[index] = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return order
