"""Profile the model of a run without allocating it: its parameters, its optimizer's state and its activations."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torchmetrics import Metric

from lockstep.compat.torch import apply_to_states, fake_tensors, real_tensors, tree_leaves, tree_map_only
from lockstep.core import LockstepError, UsageError
from lockstep.data import ImageData
from lockstep.planning.fake_step import DTYPES, ModelInspector, run_fake_step
from lockstep.planning.memory import Activations, ModelProfile
from lockstep.strategies import required_ops
from lockstep.trainer import instantiate, set_optimizer

log = logging.getLogger(__name__)

_BATCH_SIZES = (2, 4)
"""Samples of the two batches that are measured; activations grow linearly between them."""


def profile_model(config: Namespace, precision: str) -> ModelProfile:
    """Measure everything that decides how much memory the run of ``config`` needs.

    Where activations cannot be measured, the profile has none, and the log gives the reason.

    Raises:
        UsageError: The module has several optimizers, or one that DeepSpeed compiles at first use.
        Exception: Whatever the module raises before it trains.
    """
    if precision == "16-mixed":
        precision = "bf16-mixed"  # the same size, without a scaler that reads values
    precisions = {"ddp": precision, "zero": precision.replace("-mixed", "-true")}
    for op in required_ops(config):
        if op.key == "model.optimizer":
            raise UsageError(
                f"{op.reason} is compiled at first use, which --plan does not do; plan with adamw, whose state is as large."
            )
    data = LightningDataModule() if config.data is None else instantiate_key("data", LightningDataModule, config)
    make_batch, global_batch, batch_per_rank = batch_source(data)
    vars(data).update(prepare_data=lambda: None, setup=lambda stage: None)
    with fake_tensors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = {name: measure(config, data, make_batch, name) for name in dict.fromkeys(precisions.values())}
    return replace(
        measured[precision][0],
        activations={strategy: found for strategy, name in precisions.items() if (found := measured[name][1]) is not None},
        global_batch=global_batch,
        batch_per_rank=batch_per_rank,
    )


def measure(
    config: Namespace, data: LightningDataModule, make_batch: Callable[[int], Any] | None, precision: str
) -> tuple[ModelProfile, Activations | None]:
    """Return the profile without activations and batch size, and the activations where they can be measured."""
    inspector, peaks = ModelInspector(has_batch=make_batch is not None), []
    for size in _BATCH_SIZES:
        module = make_on_meta(config, precision)
        replace_with_fake_tensors(module)
        batch = None if make_batch is None else make_batch(size)
        try:
            peak = run_fake_step(config, module, data, batch, precision, inspector)
        except Exception as error:
            if isinstance(error, LockstepError) or inspector.profile is None:
                raise
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            log.warning("activations are unknown: a step without tensor contents failed (%s)", what)
            peak = None
        if peak is None:
            break
        peaks.append(peak)
    assert inspector.profile is not None
    if len(peaks) < len(_BATCH_SIZES):
        return inspector.profile, None
    per_sample = max(0.0, (peaks[1] - peaks[0]) / (_BATCH_SIZES[1] - _BATCH_SIZES[0]))
    return inspector.profile, Activations(max(0.0, peaks[0] - per_sample * _BATCH_SIZES[0]), per_sample)


def instantiate_key(key: str, base: type, config: Namespace) -> Any:
    """Instantiate the class that ``key`` of ``config`` names."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(base, key, fail_untyped=False)
    alone = config.clone()
    for other in set(vars(alone)) - {key}:
        del alone[other]
    return instantiate(parser, alone)[key]


def make_on_meta(config: Namespace, precision: str) -> LightningModule:
    """Make the module on the meta device if possible, with parameters of the type that they are trained in."""
    try:
        with torch.device("meta"):
            module: LightningModule = instantiate_key("model", LightningModule, config)
    except RuntimeError:  # its __init__ reads tensor contents
        with real_tensors():
            module = instantiate_key("model", LightningModule, config)
    set_optimizer(module, config)
    bits, _, kind = precision.partition("-")
    if kind == "true":
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[bits])
    return module


def replace_with_fake_tensors(module: nn.Module) -> None:
    """Replace parameters, buffers and metric states by fake tensors on the CPU; tied parameters stay tied."""
    replaced: dict[int, nn.Parameter] = {}

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    for submodule in module.modules():
        for name, parameter in list(submodule.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in replaced:
                replaced[id(parameter)] = nn.Parameter(fake(parameter), parameter.requires_grad)
            setattr(submodule, name, replaced[id(parameter)])
        for name, buffer in list(submodule.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(submodule, name, fake(buffer))
        if isinstance(submodule, Metric):  # its states are neither parameters nor buffers
            apply_to_states(submodule, lambda tensor: fake(tensor) if tensor.is_meta else tensor)


def batch_source(data: LightningDataModule) -> tuple[Callable[[int], Any] | None, int | None, int | None]:
    """Return a function that makes a batch of a given size, and ``global_batch`` and ``batch_per_rank`` of ``ModelProfile``.

    The function is None, with a warning, where no sample can be read before ``prepare_data``.
    """
    if isinstance(data, ImageData):
        shape, per_rank = data.image_shape, data.batch_size_per_rank
        global_batch = None if per_rank else data.global_batch_size
        return lambda size: data.collate([(torch.zeros(shape, dtype=torch.uint8), 0)] * size), global_batch, per_rank
    try:
        data.setup("fit")
        loader = data.train_dataloader()
        is_sharded = (  # lockstep shards it, so batch_size is the global batch
            isinstance(loader, DataLoader)
            and not isinstance(loader.dataset, IterableDataset)
            and type(loader.batch_sampler) is BatchSampler
        )
        if is_sharded:
            sample = next(iter(DataLoader(loader.dataset, batch_size=2, collate_fn=loader.collate_fn)))
        else:
            sample = next(iter(loader))
        length = next(len(leaf) for leaf in tree_leaves(sample) if isinstance(leaf, Tensor) and leaf.ndim)
    except Exception as error:  # user code may raise anything before prepare_data has run
        log.warning("activations are unknown: cannot read a sample of the data (%s: %s)", type(error).__name__, error)
        return None, None, None

    def make_batch(size: int) -> Any:
        return tree_map_only(Tensor, lambda t: t.new_zeros(size, *t.shape[1:]) if t.ndim and len(t) == length else t, sample)

    return (make_batch, loader.batch_size, None) if is_sharded else (make_batch, None, length)
