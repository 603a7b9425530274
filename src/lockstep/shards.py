"""What ZeRO has shared out, saved so that it knows no ranks: slices of each weight, and of what the optimizer keeps for it.

A rank's ``shard-N.pt`` holds ``slices`` (by the parameter's name: ``start``, and one-dimensional float32 tensors: ``weight``,
and what the optimizer keeps, such as ``exp_avg``), ``scalars`` (what the optimizer keeps once, such as ``step``), ``groups``
(its options), the loss ``scaler`` and ``counters`` of the engine. Whoever reads takes what it needs from the files of all
ranks: any number of ranks, any stage, and DDP.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.errors import UsageError
from lockstep.state import State

WEIGHT = "weight"


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


def names_of(module: nn.Module) -> dict[int, str]:
    """The names of parameters by their ``id``; the first one of those that are tied."""
    return {id(p): name for name, p in module.named_parameters()}


def take_shards(engine: Any, module: nn.Module) -> State:
    """What this rank has of the weights and of the optimizer's state; tensors are the live ones, in memory or on NVMe."""
    names = names_of(module)
    zero = engine.optimizer
    inner = zero.optimizer
    flats = _flats(zero)
    kept = inner.state[flats[0]] if flats and flats[0] in inner.state else {}
    keys = [WEIGHT, *(key for key, value in kept.items() if _is_shared(value, flats[0]))]
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
        "scalars": {key: value for key, value in kept.items() if not _is_shared(value, flats[0])},
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups],
        "scaler": {
            key: value for key, value in vars(zero.loss_scaler).items() if isinstance(value, bool | int | float | str | None)
        },
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
    }


_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def put_shards(engine: Any, module: nn.Module, saved: "Saved") -> None:
    """Make the weights that the optimizer steps, and its state, on this rank what ``saved`` says."""
    zero = engine.optimizer
    inner = zero.optimizer
    parts = [part for part in _fragments(engine, module) if part.flat is not None]
    for number, flat in enumerate(_flats(zero)):
        with torch.no_grad(), _in_memory(zero, number):
            inner.state[flat] = {
                **{key: torch.zeros_like(flat) for key in saved.keys},
                **{key: _for(inner, flat, value) for key, value in saved.scalars.items()},
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


def _for(optimizer: Optimizer, flat: Tensor, value: Any) -> Any:
    """``value`` where ``optimizer`` wants it: the step of a fused one lives on the device."""
    if not isinstance(value, Tensor):
        return value
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return value.to(flat.device if on_device else value.device, copy=True)


def _flats(zero: Any) -> list[Tensor]:
    """The tensors that the inner optimizer steps: this rank's part of all parameters of a group, one after the other."""
    flats = getattr(zero, "single_partition_of_fp32_groups", None)
    return list(zero.fp32_partitioned_groups_flat if flats is None else flats)


def _is_shared(value: Any, flat: Tensor) -> bool:
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
        return _flat(zero, number, key).narrow(0, inside.start, inside.numel)

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
        return _on_nvme(zero, number, _flat(zero, number, key)).narrow(0, offset, size)

    def write(key: str, value: Tensor) -> None:
        assert number is not None
        _flat(zero, number, key).narrow(0, offset, whole).copy_(torch.nn.functional.pad(value, (0, whole - size)))

    return Fragment(name, list(p.ds_shape), start, size, number, read, write)


def _flat(zero: Any, number: int, key: str) -> Tensor:
    """What the optimizer steps, or keeps under ``key``, as the flat tensor of that number."""
    flat = _flats(zero)[number]
    found: Tensor = flat if key == WEIGHT else zero.optimizer.state[flat][key]
    return found


def _on_nvme(zero: Any, number: int, tensor: Tensor) -> Tensor:
    """What ``tensor``, a flat one of that number, stands for: while DeepSpeed has it on NVMe, it is empty.

    Mapped, not read: a state that is offloaded does not fit into memory. Between two steps nothing writes to the file.
    """
    swapper = zero.optimizer_swapper
    swapped = swapper and swapper.swap_params_info.get(swapper.parameter_id(_flats(zero)[number]))
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


class Saved:
    """All weights and all state of the optimizer in a checkpoint, of which only what is asked for is read from disk.

    Attributes:
        shapes: Of the parameters, by name.
        aliases: Other names of the same parameters, where some are tied.
        keys: What the optimizer keeps of each element.
        scalars, groups, scaler, counters: As in a shard.
    """

    def __init__(self, pieces: dict[str, list[State]], keys: Sequence[str], **more: Any) -> None:
        self._pieces = pieces
        self.shapes = {name: torch.Size(parts[0]["shape"]) for name, parts in pieces.items()}
        self.keys = tuple(keys)
        self.aliases: dict[str, str] = more.get("aliases", {})
        self.scalars: State = more.get("scalars", {})
        self.groups: list[State] = more.get("groups", [])
        self.scaler: State = more.get("scaler", {})
        self.counters: State = more.get("counters", {})

    @classmethod
    def of(cls, folder: Path) -> "Saved | None":
        """What the shards in ``folder`` hold; None where there are none."""
        files = sorted(folder.glob("shard-*.pt"), key=lambda path: int(path.stem.rpartition("-")[2]))
        shards = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in files]
        if not shards:
            return None
        pieces: dict[str, list[State]] = {}
        for shard in shards:
            for name, piece in shard["slices"].items():
                pieces.setdefault(name, []).append(piece)
        kept = {key for parts in pieces.values() for piece in parts for key in piece}
        first = shards[0]
        more = {name: first[name] for name in ("aliases", "scalars", "groups", "scaler", "counters")}
        return cls(pieces, sorted(kept - {"start", "shape", WEIGHT}), **more)

    @classmethod
    def of_whole(cls, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any] | None, names: Sequence[str]) -> "Saved":
        """A checkpoint of DDP.

        Args:
            weights: Its ``state_dict``.
            optimizer: The ``state_dict`` of its optimizer; None gives weights alone.
            names: The parameters in the order of the optimizer.
        """
        pieces: dict[str, list[State]] = {
            name: [{"start": 0, "shape": value.shape, WEIGHT: value.reshape(-1)}] for name, value in weights.items()
        }
        kept = optimizer["state"] if optimizer is not None else {}
        first: State = next(iter(kept.values()), {})
        keys = [key for key, value in first.items() if isinstance(value, Tensor) and value.dim() > 0]
        for index, state in kept.items():
            pieces[names[index]][0].update({key: state[key].reshape(-1) for key in keys if key in state})
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer["param_groups"]] if optimizer else []
        return cls(pieces, keys, scalars={k: v for k, v in first.items() if k not in keys}, groups=groups)

    def slice(self, name: str, key: str, start: int, size: int) -> Tensor:
        """Elements ``start`` to ``start + size`` of one tensor of a parameter; zeros of what the optimizer has not kept yet.

        Raises:
            UsageError: The parameter is not in the checkpoint.
        """
        found = torch.zeros(size, dtype=torch.float32)
        missing = size
        for piece in self._pieces.get(name, ()):
            first = max(start, piece["start"])
            last = min(start + size, piece["start"] + piece[WEIGHT].numel())
            if first < last:
                if key in piece:
                    found[first - start : last - start] = piece[key][first - piece["start"] : last - piece["start"]]
                missing -= last - first
        if missing:
            raise UsageError(f"The checkpoint is of another model: it lacks {missing} of {size} elements of {name}.")
        return found

    def refuse_other_model(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise UsageError, which names the first parameters that differ, if these are not those of ``shapes``."""
        wrong = [
            f"{name} is {list(shape)} here and {list(self.shapes[name]) if name in self.shapes else 'not'} there"
            for name, shape in shapes.items()
            if self.shapes.get(name) != shape
        ]
        wrong += [f"{name} is {list(shape)} there and not here" for name, shape in self.shapes.items() if name not in shapes]
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UsageError(f"The checkpoint is of another model: {'; '.join(wrong[:3])}{more}.")

    def include(self, weights: Mapping[str, Tensor]) -> None:
        """Add whole weights that are not shared out, such as frozen ones."""
        for name, value in weights.items():
            if name not in self.shapes:
                self._pieces[name] = [{"start": 0, "shape": value.shape, WEIGHT: value.reshape(-1)}]
                self.shapes[name] = value.shape

    def weights(self) -> dict[str, Tensor]:
        """The whole weights, in float32; tied ones under each of their names."""
        whole = {name: self.whole(name) for name in self.shapes}
        return whole | {alias: whole[name] for alias, name in self.aliases.items()}

    def whole(self, name: str) -> Tensor:
        """One whole weight, in float32."""
        return self.slice(name, WEIGHT, 0, self.shapes[name].numel()).reshape(self.shapes[name])

    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> State:
        """The ``state_dict`` of ``optimizer`` as DDP has it.

        Args:
            optimizer: One that has the parameters themselves.
            names: Of the parameters, by ``id``.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            index: {
                **{key: v.clone() if isinstance(v, Tensor) else v for key, v in self.scalars.items()},
                **{key: self.slice(names[id(p)], key, 0, p.numel()).reshape(p.shape) for key in self.keys},
            }
            for index, p in enumerate(parameters)
            if p.requires_grad  # a frozen one's step would stay behind, and stand for all when ZeRO takes over again
        }
        groups, at = [], 0
        for group, options in zip(optimizer.param_groups, self.groups, strict=True):
            groups.append({**options, "params": list(range(at, at + len(group["params"])))})
            at += len(group["params"])
        return {"state": state, "param_groups": groups}
