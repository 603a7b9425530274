"""One step of a training without its memory: how large the model, its optimizer and its activations would be.

The module is made on torch's meta device and trained by lightning's own Trainer on tensors that have a shape and no content
(torch's FakeTensorMode); torch's MemTracker tells what would have been alive.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torchmetrics import Metric

from lockstep.core import LockstepError, UsageError
from lockstep.data import ImageData
from lockstep.planning.memory import Activations, ModelProfile
from lockstep.strategies import required_ops
from lockstep.trainer import ActivationCheckpointing, instantiate

log = logging.getLogger(__name__)


T = TypeVar("T")


_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}


_SIZES = (2, 4)
"""Samples of the two batches that are measured."""


@dataclass(frozen=True)
class BatchSource:
    """What a DataModule gives to train on.

    Attributes:
        of: A batch of so many samples.
        whole: Samples of a step over all ranks; None where each rank has its own.
        each_rank: Samples of a step on each rank, where that does not depend on the ranks.
    """

    of: Callable[[int], Any]
    whole: int | None
    each_rank: int = 0


class InspectionDone(Exception):
    """All that was asked for is known."""


class ModelInspector(Callback):
    """Looks at a module when its training begins, and ends that after one step; at once where there is no batch."""

    is_blind = False
    numels: Sequence[int] = ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise UsageError(f"--plan is for a module with one optimizer; this one has {len(trainer.optimizers)}.")
        optimizer = trainer.optimizers[0]
        self.state = {
            dtype.itemsize: optimizer_bytes_per_element(optimizer, dtype)
            for dtype in (torch.bfloat16, torch.float32, torch.float64)
        }
        self.groups = [[p.numel() for p in group["params"]] for group in optimizer.param_groups]
        self.is_fused = all(group.get("fused") for group in optimizer.param_groups)
        self.buffers = sum(b.nbytes for b in pl_module.buffers())
        self.numels = [p.numel() for p in pl_module.parameters()]
        if self.is_blind:
            raise InspectionDone
        # Or the peak of a small batch would be at the end of backward, where gradients are all there and activations are gone.
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = True


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class InPlaceStrategy(SingleDeviceStrategy):
    """Everything stays where it is; what is alive at the peak is noted between backward and the optimizer's step.

    Args:
        tracker: Sees every tensor.
    """

    def __init__(self, tracker: MemTracker) -> None:
        super().__init__(device=torch.device("cpu"))
        self.tracker = tracker
        self.activations: int | None = None

    def model_to_device(self) -> None:
        """Nothing: it is there."""

    def teardown(self) -> None:
        """Nothing: it stays there."""

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        result = closure()
        peak = {str(kind): size for kind, size in self.tracker.get_tracker_snapshot("peak")[self.root_device].items()}
        self.activations = sum(peak[f"_MemRefType.{kind}"] for kind in ("ACT", "TEMP", "OTH"))
        return result


class SingleTypePrecision(Precision):
    """Everything in one type, which the module has already: so DeepSpeed computes, and so do lightning's ``…-true``.

    Args:
        precision: Such as ``bf16-true``.
    """

    def __init__(self, precision: Any) -> None:
        self.precision = precision
        self.dtype = _DTYPES[precision.partition("-")[0]]

    def convert_input(self, data: Any) -> Any:
        return tree_map_only(Tensor, lambda value: value.to(self.dtype) if value.is_floating_point() else value, data)


class RepeatedBatch:
    """A loader that gives one batch again and again.

    Args:
        batch: That batch.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1_000_000  # enough for any schedule

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.batch


def profile_model(config: Namespace, precision: str) -> ModelProfile:
    """What decides how much memory the run of ``config`` needs. Where activations cannot be known, the log says why.

    Args:
        config: As ``parse`` gave it.
        precision: As in lightning's Trainer, ``auto`` resolved.

    Raises:
        UsageError: The module has several optimizers.
        Exception: Whatever the module raises before it trains.
    """
    if precision == "16-mixed":
        precision = "bf16-mixed"  # as large, and without a scaler that reads values
    strategies = {"ddp": precision, "zero": precision.replace("-mixed", "-true")}
    for op in required_ops(config):
        if op.reason.startswith("model.optimizer"):
            raise UsageError(
                f"{op.reason} is compiled at first use, which --plan does not do; plan with adamw, which keeps as much."
            )
    data = instantiate_key("data", LightningDataModule, config)
    batches = batch_source(data)
    vars(data).update(prepare_data=lambda: None, setup=lambda stage: None)
    seen: dict[str, tuple[ModelInspector, Activations | None]] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, FakeCopyMode(mode), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in dict.fromkeys(strategies.values()):
            seen[name] = measure(config, data, batches, name)
    look = seen[precision][0]
    return ModelProfile(
        numels=look.numels,
        groups=look.groups,
        buffers=look.buffers,
        state=look.state,
        is_fused=look.is_fused,
        activations={way: found for way, name in strategies.items() if (found := seen[name][1]) is not None},
        batch=batches.whole if batches else None,
        batch_per_rank=batches.each_rank if batches else None,
    )


def measure(
    config: Namespace, data: LightningDataModule, batches: BatchSource | None, precision: str
) -> tuple[ModelInspector, Activations | None]:
    """What a module is, and its activations, where they can be known, in one precision."""
    look, peaks = ModelInspector(), []
    for size in _SIZES:
        module = make_on_meta(config, precision)
        replace_with_fake_tensors(module)
        try:
            peaks.append(run_fake_step(config, module, data, batches and batches.of(size), precision, look))
        except InspectionDone:
            return look, None
        except Exception as error:
            if isinstance(error, LockstepError) or not look.numels:
                raise
            log.warning(
                "activations are not known: a step without content failed (%s: %s)",
                type(error).__name__,
                " ".join(str(error).split())[:200],
            )
            return look, None
    each = max(0.0, (peaks[1] - peaks[0]) / (_SIZES[1] - _SIZES[0]))
    return look, Activations(max(0.0, peaks[0] - each * _SIZES[0]), each)


def run_fake_step(
    config: Namespace, module: LightningModule, data: LightningDataModule, batch: Any, precision: Any, look: ModelInspector
) -> int:
    """Train ``module`` for one step, and return the bytes that were alive at the peak of forward and backward beside weights,
    gradients and what the optimizer keeps.

    Raises:
        Enough: There is no batch.
        Exception: Whatever does not work without content.
    """
    tracker = MemTracker()
    still = InPlaceStrategy(tracker)
    look.is_blind = batch is None
    loader = RepeatedBatch(tree_map_only(Tensor, torch.empty_like, batch))
    vars(data).update(train_dataloader=lambda: loader)
    given = {name: config.trainer[name] for name in ("max_epochs", "max_steps", "gradient_clip_val")}
    is_narrow = precision.endswith("-true") and precision != "32-true"
    trainer = Trainer(
        **given,
        strategy=still,
        accelerator="cpu",  # also where there are GPUs
        devices=1,
        precision=None if is_narrow else precision,
        plugins=[SingleTypePrecision(precision)] if is_narrow else None,
        callbacks=[ActivationCheckpointing(config.activation_checkpointing), look],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with tracker, torch.compiler.set_stance("force_eager"):
        tracker.track_external(module)
        trainer.fit(module, datamodule=data)
    assert still.activations is not None
    return still.activations


def instantiate_key(key: str, base: type[T], config: Namespace) -> T:
    """The object that one key of ``config`` names."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(base, key, fail_untyped=False)
    alone = config.clone()
    for other in set(vars(alone)) - {key}:
        del alone[other]
    made: T = instantiate(parser, alone)[key]
    return made


def make_on_meta(config: Namespace, precision: str) -> LightningModule:
    """The module without memory, where it can be made so; its parameters are of the type that they are trained in."""
    try:
        with torch.device("meta"):
            module = instantiate_key("model", LightningModule, config)
    except RuntimeError:  # it looks at values while it is made
        with unset_fake_temporarily():
            module = instantiate_key("model", LightningModule, config)
    bits, _, kind = precision.partition("-")
    if kind == "true":
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(_DTYPES[bits])
    return module


def replace_with_fake_tensors(module: nn.Module) -> None:
    """Put tensors that have a shape and no content, on the CPU, in the place of all of a module's."""
    blanks: dict[int, Any] = {}

    def blank(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                tied = blanks.get(id(parameter))
                part._parameters[name] = nn.Parameter(blank(parameter), parameter.requires_grad) if tied is None else tied
                blanks[id(parameter)] = part._parameters[name]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else blank(buffer)
        if isinstance(part, Metric):  # what it counts is neither
            part._apply(lambda tensor: blank(tensor) if tensor.is_meta else tensor)


def optimizer_bytes_per_element(optimizer: Optimizer, dtype: torch.dtype) -> float:
    """Bytes that ``optimizer`` keeps for an element of ``dtype``, seen in a step on a small flat tensor."""
    numel = 1 << 14
    with unset_fake_temporarily(), torch._C.DisableTorchFunction():  # or copies of it would have no content either
        flat = nn.Parameter(torch.ones(numel, dtype=dtype))
        flat.grad = torch.ones_like(flat)
        others = optimizer.param_groups[:]
        optimizer.add_param_group({"params": [flat]})
        try:
            del optimizer.param_groups[:-1]
            optimizer.step()
        finally:
            optimizer.param_groups[:] = others
        kept = optimizer.state.pop(flat, {})
    return sum(value.nbytes for value in kept.values() if isinstance(value, Tensor) and value.numel() > 1) / numel


def batch_source(data: LightningDataModule) -> BatchSource | None:
    """What ``data`` gives to train on; None, and a line in the log, where that cannot be known before the data are prepared."""
    if isinstance(data, ImageData):
        shape, each_rank = data.image_shape, data.batch_size_per_rank
        return BatchSource(
            lambda size: data.collate([(torch.zeros(shape, dtype=torch.uint8), 0)] * size),
            None if each_rank else data.global_batch_size,
            each_rank or 0,
        )
    try:
        data.setup("fit")
        loader = data.train_dataloader()
        is_ours_to_share = (
            isinstance(loader, DataLoader)
            and not isinstance(loader.dataset, IterableDataset)
            and type(loader.batch_sampler) is BatchSampler
        )
        if is_ours_to_share:
            sample = next(iter(DataLoader(loader.dataset, batch_size=2, collate_fn=loader.collate_fn)))
        else:
            sample = next(iter(loader))
        found = next(len(leaf) for leaf in tree_leaves(sample) if isinstance(leaf, Tensor) and leaf.ndim)
    except Exception as error:  # whatever a user's data do where they have not been prepared
        log.warning("activations are not known: no sample of the data could be read (%s: %s)", type(error).__name__, error)
        return None

    def of(size: int) -> Any:
        return tree_map_only(Tensor, lambda t: t.new_zeros(size, *t.shape[1:]) if t.ndim and len(t) == found else t, sample)

    return BatchSource(of, loader.batch_size, 0) if is_ours_to_share else BatchSource(of, None, found)
