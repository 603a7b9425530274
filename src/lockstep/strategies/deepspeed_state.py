"""Save and restore what ZeRO has partitioned, in the format of ``ShardedState``."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.checkpoint import WEIGHT, ShardedState, State, parameter_names
from lockstep.compat.deepspeed import ZeroOptimizer


def capture_shards(zero: ZeroOptimizer, module: nn.Module) -> State:
    """This rank's shard; tensors are live, or mapped from NVMe."""
    names, flats, inner = parameter_names(module), zero.flats, zero.inner
    state = inner.state[flats[0]] if flats and flats[0] in inner.state else {}
    keys = [key for key, value in state.items() if _is_partitioned(value, flats[0])]
    return {
        "slices": {
            part.name: {
                "start": part.start,
                "shape": part.shape,
                WEIGHT: part.read(),
                **({} if part.flat is None else {key: part.read(key) for key in keys}),
            }
            for part in zero.fragments(module)
        },
        "aliases": {
            alias: names[id(p)] for alias, p in module.named_parameters(remove_duplicate=False) if names[id(p)] != alias
        },
        "scalars": {key: value for key, value in state.items() if key not in keys},
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups],
        **zero.capture_counters(),
    }


def restore_shards(zero: ZeroOptimizer, module: nn.Module, saved: ShardedState) -> None:
    """Set the weights that the optimizer steps, and its state, on this rank to what is ``saved``."""
    inner = zero.inner
    parts = [part for part in zero.fragments(module) if part.flat is not None]
    for index, flat in enumerate(zero.flats):
        with torch.no_grad(), zero.in_memory(index):
            inner.state[flat] = {
                **{key: torch.zeros_like(flat) for key in saved.keys},
                **{key: _place_scalar(inner, flat, value) for key, value in saved.scalars.items()},
            }
            for part in parts:
                if part.flat == index:
                    part.write(None, saved.slice(part.name, WEIGHT, part.start, part.size))
                    for key in saved.keys:
                        part.write(key, saved.slice(part.name, key, part.start, part.size))
    zero.update_model_weights()
    for group, options in zip(inner.param_groups, saved.groups, strict=bool(saved.groups)):
        group.update(options)
    zero.restore_counters(saved.scaler, saved.counters)


def _place_scalar(optimizer: Optimizer, flat: Tensor, value: Any) -> Any:
    """A copy of ``value`` where ``optimizer`` needs it: the step of a fused optimizer is on the device."""
    if not isinstance(value, Tensor):
        return value
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return value.to(flat.device if on_device else value.device, copy=True)


def _is_partitioned(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape
