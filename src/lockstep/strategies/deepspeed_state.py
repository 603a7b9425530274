"""What ZeRO has shared out, saved so that it knows no ranks: slices of each weight, and of what the optimizer keeps for it.

A rank's ``shard-N.pt`` holds ``slices`` (by the parameter's name: ``start``, and one-dimensional float32 tensors: ``weight``,
and what the optimizer keeps, such as ``exp_avg``), ``scalars`` (what the optimizer keeps once, such as ``step``), ``groups``
(its options), the loss ``scaler`` and ``counters`` of the engine. Whoever reads takes what it needs from the files of all
ranks: any number of ranks, any stage, and DDP.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.checkpoint import WEIGHT, ShardedState, State, parameter_names


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter that is this rank's.

    Attributes:
        name: Of the parameter.
        shape: Of the whole parameter.
        start, size: Of the part, in the flattened parameter.
        flat: Number of the flat tensor that the optimizer steps and that it is in; None where nothing steps it.
        read: Gives one of its tensors, by key.
        write: Replaces one of its tensors, while the flat one is in memory.
    """

    name: str
    shape: list[int]
    start: int
    size: int
    flat: int | None
    read: Callable[[str], Tensor]
    write: Callable[[str, Tensor], None]


def capture_shards(engine: Any, module: nn.Module) -> State:
    """What this rank has of the weights and of the optimizer's state; tensors are the live ones, in memory or on NVMe."""
    names = parameter_names(module)
    zero = engine.optimizer
    inner = zero.optimizer
    flats = _flat_tensors(zero)
    kept = inner.state[flats[0]] if flats and flats[0] in inner.state else {}
    keys = [WEIGHT, *(key for key, value in kept.items() if _is_partitioned(value, flats[0]))]
    return {
        "slices": {
            part.name: {
                "start": part.start,
                "shape": part.shape,
                **{key: part.read(key) for key in ((WEIGHT,) if part.flat is None else keys)},
            }
            for part in _fragments(engine, module)
        },
        "aliases": {
            alias: names[id(p)] for alias, p in module.named_parameters(remove_duplicate=False) if names[id(p)] != alias
        },
        "scalars": {key: value for key, value in kept.items() if not _is_partitioned(value, flats[0])},
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups],
        "scaler": {
            key: value for key, value in vars(zero.loss_scaler).items() if isinstance(value, bool | int | float | str | None)
        },
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
    }


_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def restore_shards(engine: Any, module: nn.Module, saved: "ShardedState") -> None:
    """Make the weights that the optimizer steps, and its state, on this rank what ``saved`` says."""
    zero = engine.optimizer
    inner = zero.optimizer
    parts = [part for part in _fragments(engine, module) if part.flat is not None]
    for number, flat in enumerate(_flat_tensors(zero)):
        with torch.no_grad(), _in_memory(zero, number):
            inner.state[flat] = {
                **{key: torch.zeros_like(flat) for key in saved.keys},
                **{key: _place_scalar(inner, flat, value) for key, value in saved.scalars.items()},
            }
            for part in parts:
                for key in (WEIGHT, *saved.keys) if part.flat == number else ():
                    part.write(key, saved.slice(part.name, key, part.start, part.size))
    if hasattr(zero, "update_lp_params"):  # stages 1 and 2: the weights that the model computes with
        zero.update_lp_params()
    for group, options in zip(inner.param_groups, saved.groups, strict=bool(saved.groups)):
        group.update(options)
    vars(zero.loss_scaler).update(saved.scaler)
    for name, value in saved.counters.items():
        setattr(engine, name, value)


def _place_scalar(optimizer: Optimizer, flat: Tensor, value: Any) -> Any:
    """``value`` where ``optimizer`` wants it: the step of a fused one lives on the device."""
    if not isinstance(value, Tensor):
        return value
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return value.to(flat.device if on_device else value.device, copy=True)


def _flat_tensors(zero: Any) -> list[Tensor]:
    """The tensors that the inner optimizer steps: this rank's part of all parameters of a group, one after the other."""
    flats = getattr(zero, "single_partition_of_fp32_groups", None)
    return list(zero.fp32_partitioned_groups_flat if flats is None else flats)


def _is_partitioned(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def _fragments(engine: Any, module: nn.Module) -> Iterator[Fragment]:
    for name, parameter in module.named_parameters():
        p: Any = parameter
        if hasattr(p, "ds_tensor"):
            yield _of_stage_3(name, p, engine)
        elif getattr(p, "_hp_mapping", None) is not None:
            yield _of_stage_1(name, p, engine.optimizer)


def _of_stage_1(name: str, p: Any, zero: Any) -> Fragment:
    mapping = p._hp_mapping
    place, inside = mapping.lp_fragment_address, mapping.hp_fragment_address
    number = mapping.param_group_index

    def tensor(key: str) -> Tensor:
        # Not mapping.optim_fragment: of all groups but the first, DeepSpeed makes it before there is a state.
        return _flat_tensor(zero, number, key).narrow(0, inside.start, inside.numel)

    def write(key: str, value: Tensor) -> None:
        tensor(key).copy_(value)

    return Fragment(name, list(p.shape), place.start, place.numel, number, tensor, write)


def _of_stage_3(name: str, p: Any, engine: Any) -> Fragment:
    zero = engine.optimizer
    whole = p.ds_tensor.ds_numel  # with padding behind the last one
    start = min(whole * engine.global_rank, p.ds_numel)
    size = min(whole, p.ds_numel - start)
    identity = zero.get_param_id(p)
    is_stepped = p.requires_grad and identity in zero.grad_position
    number, offset, _ = zero.grad_position[identity] if is_stepped else (None, 0, 0)

    def read(key: str) -> Tensor:
        if number is None:
            return _partition(p).narrow(0, 0, size)
        return _on_nvme(zero, number, _flat_tensor(zero, number, key)).narrow(0, offset, size)

    def write(key: str, value: Tensor) -> None:
        assert number is not None
        _flat_tensor(zero, number, key).narrow(0, offset, whole).copy_(torch.nn.functional.pad(value, (0, whole - size)))

    return Fragment(name, list(p.ds_shape), start, size, number, read, write)


def _flat_tensor(zero: Any, number: int, key: str) -> Tensor:
    """What the optimizer steps, or keeps under ``key``, as the flat tensor of that number."""
    flat = _flat_tensors(zero)[number]
    found: Tensor = flat if key == WEIGHT else zero.optimizer.state[flat][key]
    return found


def _on_nvme(zero: Any, number: int, tensor: Tensor) -> Tensor:
    """What ``tensor``, a flat one of that number, stands for: while DeepSpeed has it on NVMe, it is empty.

    Mapped, not read: a state that is offloaded does not fit into memory. Between two steps nothing writes to the file.
    """
    swapper = zero.optimizer_swapper
    swapped = swapper and swapper.swap_params_info.get(swapper.parameter_id(_flat_tensors(zero)[number]))
    for one in swapped.tensors if swapped else ():
        if one.compute_tensor is tensor:
            return torch.from_file(one.swap_path, size=swapped.numel(), dtype=swapped.dtype())
    return tensor


def _partition(p: Any) -> Tensor:
    """This rank's part of a parameter, with padding; mapped while DeepSpeed has it on NVMe."""
    if p.ds_tensor.status.name == "AVAILABLE":
        return torch.as_tensor(p.ds_tensor)
    swapper = p.nvme_swapper
    return torch.from_file(swapper.get_path(p, must_exist=True), size=p.ds_tensor.ds_numel, dtype=swapper.dtype)


@contextmanager
def _in_memory(zero: Any, number: int) -> Iterator[None]:
    """While it lasts, a flat tensor and what the optimizer keeps for it are in memory; then where they belong.

    In stage 3 the weights that the model computes with follow.
    """
    is_stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    is_swapped = is_stage_3 and zero._swappable_optimizer_subgroup(number)
    if is_swapped:
        zero._optimizer_states_and_gradient_swap_in(number)
    yield
    if is_stage_3:
        zero._reassign_or_swap_out_partitioned_parameters(number)
    if is_swapped:
        zero._optimizer_states_and_gradient_swap_out(number)
