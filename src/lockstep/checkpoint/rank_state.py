"""Per-rank state that Lightning checkpoints omit: random numbers, streams, metrics, logged values that are not reduced yet.

The state consists of tensors and plain values, so that it loads with ``weights_only``.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer
from torchmetrics import Metric

from lockstep.checkpoint.serialization import copy_to_cpu
from lockstep.compat.lightning import capture_logged_values, restore_logged_values
from lockstep.compat.torchmetrics import capture_metric, merge_metric
from lockstep.data.loading import stream_records
from lockstep.strategies import DeepSpeed, ResumePoint, keep_state_dtypes


def capture_state(trainer: Trainer) -> dict[str, Any]:
    """The state of this rank between two steps; tensors are live."""
    module = trainer.lightning_module
    return {
        "random": capture_rng_state(trainer.strategy.root_device),
        "trainable": [name for name, p in module.named_parameters() if p.requires_grad],
        "in_eval_mode": [name for name, child in module.named_modules() if not child.training],
        "metrics": {name: capture_metric(m) for name, m in module.named_modules() if isinstance(m, Metric)},
        **capture_logged_values(trainer),
        "pruned": _pruned_parameters(module),
        "should_stop": trainer.should_stop,
        "streams": stream_records(trainer),
        "gradients": dict(_accumulating_gradients(trainer)),
    }


def _accumulating_gradients(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Gradients that the next backward adds to: those that only user code clears, and of parameters outside the optimizers.

    Lightning clears the gradients of its optimizers before each backward. With ZeRO the engine holds all gradients.
    """
    module = trainer.lightning_module
    if isinstance(trainer.strategy, DeepSpeed):
        return
    cleared = set(map(id, _optimized_parameters(trainer))) if module.automatic_optimization else set()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and id(parameter) not in cleared:
            yield name, parameter.grad


def _pruned_parameters(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Masks and original values of pruned parameters, by name; ModelPruning omits the masks from its checkpoint."""
    buffers, parameters = dict(module.named_buffers()), dict(module.named_parameters())
    names = [name.removesuffix("_orig") for name in parameters if name.endswith("_orig")]
    return {
        name: {"mask": buffers[f"{name}_mask"], "orig": parameters[f"{name}_orig"]}
        for name in names
        if f"{name}_mask" in buffers
    }


def _restore_pruned_parameters(module: nn.Module, pruned: Mapping[str, Mapping[str, Tensor]]) -> None:
    is_pruned = _pruned_parameters(module).keys()
    for name in [name for name in pruned if name not in is_pruned]:  # in the order of the parameters, on all ranks
        owner, _, parameter = name.rpartition(".")
        weight = module.get_parameter(name)
        prune.custom_from_mask(module.get_submodule(owner), parameter, pruned[name]["mask"].to(weight.device))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            weight.copy_(pruned[name]["orig"])  # the same object, which is now called orig


def _optimized_parameters(trainer: Trainer) -> Iterator[Tensor]:
    for optimizer in trainer.optimizers:
        for group in getattr(optimizer, "param_groups", ()):  # Lightning's stand-in for no optimizer has none
            yield from group["params"]


def restore_state(trainer: Trainer, point: ResumePoint) -> None:
    """Restore the state of this rank."""
    module, states = trainer.lightning_module, point.states
    _restore_pruned_parameters(module, point.shared["pruned"])
    for name, metric in module.named_modules():
        if isinstance(metric, Metric):
            metric.reset()
            for state in states:
                if name in state["metrics"]:
                    merge_metric(metric, state["metrics"][name])
            if not states and name in point.shared["metrics"]:  # without samples, it still takes part in the reduction
                merge_metric(metric, {"count": point.shared["metrics"][name]["count"], "values": {}})
    trainable = set(point.shared["trainable"])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    in_eval_mode = set(point.shared["in_eval_mode"])
    for name, child in module.named_modules() if "" not in in_eval_mode else ():  # eval() of the module ends training
        child.training = name not in in_eval_mode
    restore_logged_values(trainer, states, point.shared, is_mid_epoch=not point.has_ended)
    trainer.should_stop = point.should_stop and (not states or any(state["should_stop"] for state in states))
    for state in states[:1] if not isinstance(trainer.strategy, DeepSpeed) else ():
        for name, gradient in state["gradients"].items():
            parameter = module.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
    if len(states) == 1:
        restore_rng_state(states[0]["random"], trainer.strategy.root_device)
    else:
        torch.manual_seed(point.seed)


@contextmanager
def undo_changes(trainer: Trainer, hook: str) -> Iterator[None]:
    """Undo what the user's ``hook`` changes in the block: weights, optimizers, schedules, and states of its callbacks.

    A resumed epoch has already run its first hooks, and the checkpoint holds their effect. With ZeRO the engine holds weights
    and optimizer, which a hook does not change.
    """
    module = trainer.lightning_module
    owners: list[Any] = [callback for callback in trainer.callbacks if is_overridden(hook, callback)]  # type: ignore[attr-defined]
    if (owners or is_overridden(hook, module)) and not isinstance(trainer.strategy, DeepSpeed):
        owners += [module, *trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs)]
    states = [copy_to_cpu(owner.state_dict()) for owner in owners]
    yield
    for owner, state in zip(owners, states, strict=True):
        if isinstance(owner, nn.Module):
            owner.load_state_dict(state, strict=False)  # its state_dict may be incomplete
        elif state:
            owner.load_state_dict(state)
            if isinstance(owner, Optimizer):
                keep_state_dtypes(owner, state)


def capture_rng_state(device: torch.device) -> dict[str, Any]:
    """States of the random number generators of torch (CPU and ``device``), numpy and ``random``."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "random": (version, torch.tensor(words), gauss),
    }


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what ``capture_rng_state`` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, words, gauss = state["random"]
    random.setstate((version, tuple(words.tolist()), gauss))
