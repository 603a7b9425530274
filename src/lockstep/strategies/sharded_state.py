"""ZeRO's partitioned weights and optimizer state, saved so that any number of ranks, any stage and DDP can load them.

A rank's ``shard-N.pt`` is a list of dicts, one for each flat tensor that its optimizer steps: ``weight`` and optimizer state
such as ``exp_avg``. Weights that the optimizer does not step follow, each in a dict of its own.

``shards.pt`` is the index of them all, a dict of

- ``slices``: for each parameter its ``shape`` and its ``places``, see ``join_places``
- ``aliases``: further names of tied parameters
- ``keys``: names of the optimizer's tensors, such as ``exp_avg``
- ``scalars``: optimizer state that is not per element, such as ``step``
- ``groups``: options of the parameter groups
- ``scaler`` and ``counters``: loss scaler and counters of DeepSpeed's engine

A reader memory-maps the shards that hold elements it needs, and reads only these elements.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.compat.deepspeed import full_shape
from lockstep.core import UsageError

State = dict[str, Any]
WEIGHT = "weight"
INDEX_FILE = "shards.pt"

_UNPARTITIONED = -1
"""Pseudo-rank whose shard holds the weights that are not partitioned."""


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Names of the parameters, by ``id``; tied parameters have the first of their names."""
    return {id(p): name for name, p in module.named_parameters()}


def shard_file(rank: int) -> str:
    """Name of the file with the shard of ``rank``."""
    return f"shard-{rank}.pt"


def join_places(by_rank: Sequence[Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, State]:
    """Join the places from all ranks: for each parameter its ``shape``, and the ``places`` of its slices.

    Args:
        by_rank: From each rank, int64 (5, slices): index of the parameter in ``shapes``, first element and number of elements
            in the flattened parameter, index of the dict in the shard, and first element there.

    Returns:
        For each parameter ``places``, int64 (5, slices), sorted by first element: first element, number of elements, rank,
        index of the dict in its shard, and first element there.
    """
    ranks = torch.cat([torch.full((places.shape[1],), rank) for rank, places in enumerate(by_rank)])
    parameter, start, size, index, offset = torch.cat(list(by_rank), 1)
    order = torch.argsort(start, stable=True)
    order = order[torch.argsort(parameter[order], stable=True)]
    order = order[size[order] > 0]
    places = torch.stack([start, size, ranks, index, offset])[:, order]
    ends = torch.bincount(parameter[order], minlength=len(shapes)).cumsum(0)[:-1].tolist()
    partitioned = set(parameter.unique().tolist())
    return {
        name: {"shape": list(shape), "places": part.clone()}
        for number, ((name, shape), part) in enumerate(zip(shapes.items(), places.tensor_split(ends, 1), strict=True))
        if number in partitioned
    }


@dataclass
class ShardedState:
    """All weights and optimizer state of a checkpoint; files are memory-mapped, and only the elements in use are read.

    Attributes:
        folder: Where the shards are.
        slices, aliases, keys, scalars, groups, scaler, counters: As in the index, see above.
    """

    folder: Path = Path()
    slices: dict[str, State] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    scalars: State = field(default_factory=dict)
    groups: list[State] = field(default_factory=list)
    scaler: State = field(default_factory=dict)
    counters: State = field(default_factory=dict)
    _shards: dict[int, list[State]] = field(default_factory=dict)

    @classmethod
    def from_shards(cls, folder: Path) -> "ShardedState | None":
        """The state in the shards of ``folder``; None if there are none."""
        if not (file := folder / INDEX_FILE).exists():
            return None
        return cls(folder, **torch.load(file, map_location="cpu", weights_only=True, mmap=True))

    def include_weights(self, state_dict: Mapping[str, Tensor], module: nn.Module) -> None:
        """Add the weights in ``state_dict`` that are not partitioned, such as frozen ones; then compare all with ``module``.

        Raises:
            UsageError: Names or shapes differ; the message names the first parameters.
        """
        shapes = {name: full_shape(p) for name, p in module.named_parameters()}
        own = self._shards.setdefault(_UNPARTITIONED, [])
        for name, value in state_dict.items():
            if name in shapes and name not in self.slices:
                places = torch.tensor([[0], [value.numel()], [_UNPARTITIONED], [len(own)], [0]])
                self.slices[name] = {"shape": value.shape, "places": places}
                own.append({WEIGHT: value.reshape(-1)})
        saved = {name: torch.Size(found["shape"]) for name, found in self.slices.items()}
        wrong = [
            f"{name} is {list(shape)} in the model and {list(saved[name])} in the checkpoint"
            if name in saved
            else f"{name} is not in the checkpoint"
            for name, shape in shapes.items()
            if saved.get(name) != shape
        ]
        wrong += [f"{name} is not in the model" for name in saved if name not in shapes]
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UsageError(f"The checkpoint is of another model: {'; '.join(wrong[:3])}{more}.")

    def include_optimizer(self, state_dict: Mapping[str, Any], names: Sequence[str]) -> None:
        """Add the ``state_dict`` of an optimizer under DDP, which has the parameters ``names`` in this order."""
        states: Mapping[int, State] = state_dict["state"]
        first: State = next(iter(states.values()), {})
        self.keys = [key for key, value in first.items() if isinstance(value, Tensor) and value.dim() > 0]
        for index, state in states.items():
            _, _, rank, number, _ = self.slices[names[index]]["places"][:, 0].tolist()
            self._shards[rank][number].update({key: state[key].reshape(-1) for key in self.keys if key in state})
        self.scalars = {key: value for key, value in first.items() if key not in self.keys}
        self.groups = [{k: v for k, v in group.items() if k != "params"} for group in state_dict["param_groups"]]

    def slice(self, name: str, key: str, start: int, size: int) -> Tensor:
        """Elements ``start`` to ``start + size`` of a flattened tensor, in float32; zeros without optimizer state yet.

        Raises:
            UsageError: The checkpoint lacks the parameter, or elements of it.
        """
        found = torch.zeros(size, dtype=torch.float32)
        missing = size
        for first, last, tensors, offset in self._pieces(name, start, start + size):
            if key in tensors:
                found[first - start : last - start] = tensors[key][offset : offset + last - first]
            missing -= last - first
        if missing:
            raise UsageError(f"The checkpoint is of another model: it lacks {missing} of {size} elements of {name}.")
        return found

    def _pieces(self, name: str, start: int, end: int) -> Iterator[tuple[int, int, State, int]]:
        """Where the shards hold elements ``start`` to ``end``: first and last element, tensors, and first element there."""
        if name not in self.slices or start == end:
            return
        places = self.slices[name]["places"]
        first, last = torch.searchsorted(places[0].contiguous(), torch.tensor([start, end])).tolist()
        for begin, size, rank, index, offset in places[:, max(0, first - 1) : last].T.tolist():
            low, high = max(start, begin), min(end, begin + size)
            if low < high:
                yield low, high, self._shard(rank)[index], offset + low - begin

    def _shard(self, rank: int) -> list[State]:
        if rank not in self._shards:
            self._shards[rank] = torch.load(self.folder / shard_file(rank), map_location="cpu", weights_only=True, mmap=True)
        return self._shards[rank]

    def full_tensor(self, name: str, key: str = WEIGHT) -> Tensor:
        """One weight in float32, or its optimizer state under ``key``."""
        shape = torch.Size(self.slices[name]["shape"])
        return self.slice(name, key, 0, shape.numel()).reshape(shape)

    def full_weights(self) -> dict[str, Tensor]:
        """All weights in float32; a tied one under each of its names."""
        weights = {name: self.full_tensor(name) for name in self.slices}
        return weights | {alias: weights[name] for alias, name in self.aliases.items()}

    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> State:
        """The ``state_dict`` that ``optimizer`` would have under DDP; ``names`` are those of the parameters, by ``id``."""
        keys, parameters = self.keys, [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            index: {
                **{key: v.clone() if isinstance(v, Tensor) else v for key, v in self.scalars.items()},
                **{key: self.full_tensor(names[id(p)], key) for key in keys},
            }
            for index, p in enumerate(parameters)
            # ZeRO takes the step of any parameter for that of all, and a frozen parameter's step would not grow.
            if p.requires_grad
        }
        groups = zip(optimizer.state_dict()["param_groups"], self.groups, strict=True)
        return {"state": state, "param_groups": [{**options, "params": group["params"]} for group, options in groups]}
