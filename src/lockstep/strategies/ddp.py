"""``strategy: ddp``: every rank holds the whole model; a single rank trains without a process group."""

import logging
import re
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from lockstep.compat.torch import replay_backward
from lockstep.config import DDPOptions
from lockstep.core import RunError, UsageError
from lockstep.data.loading import DataSharding
from lockstep.distributed import WorldEnvironment, all_meet
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
        # As Lightning does on several ranks: ``setup`` and ``configure_model`` must draw the same on any number of ranks.
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
        self._ready: list[nn.Parameter] | None = None  # parameters in the order in which their gradients became ready
        self._is_ordered = False
        self._late: list[str] = []  # parameters that had a gradient when they were frozen
        self._late_handles: list[Any] = []

    @property
    def gradient_ready_order(self) -> list[str] | None:
        if self._resume_point is not None:
            return self._resume_point.gradient_ready_order
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        return None if self._ready is None else [names[parameter] for parameter in self._ready if parameter in names]

    def prepare_step(self) -> None:
        super().prepare_step()
        if not self._is_ordered:
            self._order_gradients()

    def _order_gradients(self) -> None:
        """Sum gradients in the same order after a restart as before it.

        After its first backward pass, DDP sorts gradients into buckets by the order in which they became ready. From the
        second step on, this changes the order of summation. The order of readiness is recorded and saved. After a restart a
        backward pass of zeros repeats it, so that the first step already uses the final buckets. This happens at the first
        step, when parameters have the names and flags of the save: pruning, for example, renames them after ``setup``.
        """
        point, self._resume_point, self._is_ordered = self._resume_point, None, True
        if self.options.find_unused_parameters:
            return
        assert isinstance(self.model, DistributedDataParallel)
        parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        order = (point.gradient_ready_order if point is not None else None) or ()
        has_all = len(order) == len(parameters) or (self.options.static_graph and len(order) > 0)  # else some may be unused
        if not has_all or not parameters.keys() >= set(order):
            self._ready = _record_ready_order(list(parameters.values()))
            return
        self._ready = [parameters[name] for name in order]
        gradients = [parameter.grad for parameter in self._ready]  # accumulated gradients, restored below
        self.module.zero_grad(set_to_none=True)
        replay_backward(self.model, self._ready)
        for parameter, gradient in zip(self._ready, gradients, strict=True):
            parameter.grad = gradient

    def on_unfrozen(self, names: Sequence[str]) -> None:
        """Wrap the module again: DDP reduces only gradients that were required when it wrapped the module."""
        if self.options.static_graph:
            raise UsageError(f"ddp.static_graph: {names[0]} begins to require a gradient during training; set it to false.")
        trainer, world = self.module.trainer, self.sharding.world
        if not all_meet(f"{len(names)} new parameters, first {names[0]}, at batch {trainer.fit_loop.total_batch_idx}", world):
            raise UsageError(
                f"{names[0]} begins to require a gradient on rank {world.rank} in step {trainer.global_step}, but not on all "
                "ranks; DDP needs the same parameters on all of them."
            )
        assert isinstance(self.model, DistributedDataParallel)
        log.info("%d parameters begin to require a gradient, first %s; DDP reduces them too", len(names), names[0])
        self.model = self.model.module
        self.configure_ddp()
        self._is_ordered = False

    def _note_parameters(self) -> None:
        super()._note_parameters()
        while self._late_handles:
            self._late_handles.pop().remove()
        for name, parameter in self._frozen.items():
            if parameter.is_floating_point() and not parameter.is_inference():
                parameter.requires_grad_(True)  # torch refuses a hook otherwise
                hook = partial(self._note_late, name)
                self._late_handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
                parameter.requires_grad_(False)

    def _note_late(self, name: str, _: Tensor) -> None:
        self._late.append(name)

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().backward(*args, **kwargs)
        if self._checked_epoch == -1:  # training_step has added parameters
            self._late += [name for name, parameter in self._new_parameters().items() if parameter.grad is not None]
        if self._late:
            raise UsageError(
                f"{self._late[0]} begins to require a gradient within step {self.module.trainer.global_step}, after DDP has "
                "prepared to reduce the others; let it do so earlier, for example in on_train_batch_start."
            )
        return loss

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
        self._refuse_sparse_gradients()
        if self.root_device.type == "cpu":
            run_sync_batchnorm_on_cpu(self.module)
        self._wait_for_device()
        super().configure_ddp()
        self._wait_for_device()
        self._reduced = [name for name, p in self.module.named_parameters() if p.requires_grad]
        if (name := self.options.gradient_compression) != "none":  # not ``ddp_comm_hook=``, which Lightning ignores on CPUs
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, getattr(default_hooks, f"{name}_compress_hook"))

    def _refuse_sparse_gradients(self) -> None:
        for name, child in self.module.named_modules():
            if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.sparse and child.weight.requires_grad:
                raise UsageError(
                    f"{name}: DDP divides all other gradients twice where a module has sparse ones (seen with torch 2.15); set "
                    "sparse=False, or train on one rank."
                )

    def _wait_for_device(self) -> None:
        """Wait for all streams: Lightning wraps the module in a stream of its own, where rank zero's weights are sent.

        When it is wrapped again during training, the last optimizer step may still write to them, and the next forward pass
        would read them too early.
        """
        if self.root_device.type == "cuda":
            torch.cuda.synchronize(self.root_device)


def _record_ready_order(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """A list to which the next backward pass appends each of ``parameters`` when its gradient is ready."""
    order: list[nn.Parameter] = []
    handles: dict[nn.Parameter, Any] = {}

    def record(parameter: nn.Parameter) -> None:
        order.append(parameter)
        handles.pop(parameter).remove()

    for parameter in parameters:
        handles[parameter] = parameter.register_post_accumulate_grad_hook(record)  # type: ignore[no-untyped-call]
    return order
