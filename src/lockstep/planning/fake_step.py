"""Run one training step on fake tensors to find the size of the optimizer's state and of the activations.

Fake tensors have a shape and a type, but no memory. Lightning's own Trainer trains the module on them, while torch's
MemTracker counts the bytes that real tensors would take.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.compat.torch import MemTracker, no_torch_function, peak_activations, real_tensors, tree_map_only
from lockstep.core import UsageError
from lockstep.planning.memory import ModelProfile
from lockstep.trainer import ActivationCheckpointing

DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}


class ModelInspector(Callback):
    """Profile the module when training starts, and end training after one step.

    Args:
        has_batch: Whether there is a batch to train on; if not, training ends before its first step.

    Attributes:
        profile: The profile without activations and batch size; None before training starts.
    """

    profile: ModelProfile | None = None

    def __init__(self, has_batch: bool) -> None:
        self.has_batch = has_batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise UsageError(f"--plan supports modules with one optimizer; this one has {len(trainer.optimizers)}.")
        optimizer = trainer.optimizers[0]
        self.profile = ModelProfile(
            numels=[p.numel() for p in pl_module.parameters()],
            group_numels=[[p.numel() for p in group["params"]] for group in optimizer.param_groups],
            buffers=sum(buffer.nbytes for buffer in pl_module.buffers()),
            optimizer_bytes={
                dtype.itemsize: optimizer_bytes_per_element(optimizer, dtype)
                for dtype in (torch.bfloat16, torch.float32, torch.float64)
            },
            is_fused=all(group.get("fused") for group in optimizer.param_groups),
        )
        trainer.should_stop = not self.has_batch
        # With gradients, a small batch would peak at the end of backward, without activations.
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = True


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class FakeDeviceStrategy(SingleDeviceStrategy):
    """Leave all tensors where they are; record the peak of forward and backward.

    Attributes:
        activations: Bytes at the peak without weights, gradients and the optimizer's state; None before the first step.
    """

    activations: int | None = None

    def __init__(self) -> None:
        super().__init__(device=torch.device("cpu"))
        self.tracker = MemTracker()

    def model_to_device(self) -> None:
        """Do nothing: fake tensors are already on the CPU."""

    teardown = model_to_device

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run forward and backward only."""
        result = closure()
        self.activations = peak_activations(self.tracker, self.root_device)
        return result


class RepeatedBatch:
    """A loader that yields the same batch forever."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1_000_000  # long enough for any schedule

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.batch


def run_fake_step(
    config: Namespace, module: LightningModule, data: LightningDataModule, batch: Any, precision: Any, inspector: ModelInspector
) -> int | None:
    """Train ``module`` for one step and return the bytes of its activations at the peak; None without a batch.

    Raises:
        Exception: The module needs the contents of a tensor.
    """
    strategy = FakeDeviceStrategy()
    is_low_precision = precision.endswith("-true") and precision != "32-true"

    def fake(tensor: Tensor) -> Tensor:
        # DeepSpeed and Lightning's …-true precisions convert inputs to the one type of the module.
        is_converted = is_low_precision and tensor.is_floating_point()
        return torch.empty_like(tensor, dtype=DTYPES[precision.partition("-")[0]] if is_converted else tensor.dtype)

    loader = RepeatedBatch(tree_map_only(Tensor, fake, batch))
    vars(data).update(train_dataloader=lambda: loader)
    trainer = Trainer(
        **{name: config.trainer[name] for name in ("max_epochs", "max_steps", "gradient_clip_val")},
        strategy=strategy,
        accelerator="cpu",  # also on machines with GPUs
        devices=1,
        precision=None if is_low_precision else precision,
        callbacks=[ActivationCheckpointing(config.activation_checkpointing), inspector],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with strategy.tracker, torch.compiler.set_stance("force_eager"):
        strategy.tracker.track_external(module)
        trainer.fit(module, datamodule=data)
    return strategy.activations


def optimizer_bytes_per_element(optimizer: Optimizer, dtype: torch.dtype) -> float:
    """Bytes of state that ``optimizer`` keeps per element of ``dtype``, measured in a step on a small flat tensor."""
    numel = 1 << 14
    with real_tensors(), no_torch_function():  # otherwise copies of the tensor would also be fake
        flat = nn.Parameter(torch.ones(numel, dtype=dtype))
        flat.grad = torch.ones_like(flat)
        groups = optimizer.param_groups[:]
        optimizer.add_param_group({"params": [flat]})
        try:
            del optimizer.param_groups[:-1]
            optimizer.step()
        finally:
            optimizer.param_groups[:] = groups
        state = optimizer.state.pop(flat, {})
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor) and value.numel() > 1) / numel
