"""Weights and optimizer state that ZeRO has partitioned, saved so that any number of ranks, any stage and DDP can load them.

A rank's ``shard-N.pt`` is a dict of

- ``slices``: for each parameter ``shape``, ``start`` and flat float32 tensors: ``weight``, and optimizer state
  such as ``exp_avg``
- ``aliases``: further names of tied parameters
- ``scalars``: optimizer state that is not per element, such as ``step``
- ``groups``: options of the parameter groups
- ``scaler`` and ``counters``: loss scaler and counters of DeepSpeed's engine

A reader maps the files of all ranks and reads only the elements that it needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.checkpoint.serialization import State
from lockstep.core import UsageError

WEIGHT = "weight"


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Names of the parameters by their ``id``; tied parameters have the first of their names."""
    return {id(p): name for name, p in module.named_parameters()}


@dataclass
class ShardedState:
    """All weights and optimizer state of a checkpoint; files are mapped, and only the elements in use are read.

    Attributes:
        slices: For each parameter the slices that its ranks have saved.
        aliases, scalars, groups, scaler, counters: As in a shard, see above.
        shapes: Shapes of the parameters, by name.
        keys: Names of the optimizer's tensors, such as ``exp_avg``.
    """

    slices: dict[str, list[State]]
    aliases: dict[str, str] = field(default_factory=dict)
    scalars: State = field(default_factory=dict)
    groups: list[State] = field(default_factory=list)
    scaler: State = field(default_factory=dict)
    counters: State = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(init=False)
    keys: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = {name: torch.Size(parts[0]["shape"]) for name, parts in self.slices.items()}
        names = {key for parts in self.slices.values() for part in parts for key in part}
        self.keys = sorted(names - {"start", "shape", WEIGHT})

    @classmethod
    def from_shards(cls, folder: Path) -> "ShardedState | None":
        """The state in the shards of ``folder``; None if there are none."""
        files = sorted(folder.glob("shard-*.pt"), key=lambda path: int(path.stem.rpartition("-")[2]))
        shards = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in files]
        if not shards:
            return None
        slices: dict[str, list[State]] = {}
        for shard in shards:
            for name, part in shard["slices"].items():
                slices.setdefault(name, []).append(part)
        return cls(slices, **{key: value for key, value in shards[0].items() if key != "slices"})

    @classmethod
    def from_full_state(
        cls, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any] | None, names: Sequence[str]
    ) -> "ShardedState":
        """The state in a checkpoint of DDP.

        Args:
            weights: The ``state_dict`` of the module.
            optimizer: The ``state_dict`` of the optimizer; None for the weights only.
            names: Names of the parameters in the order of the optimizer.
        """
        full = cls({})
        full.include(weights)
        if optimizer is None:
            return full
        states: Mapping[int, State] = optimizer["state"]
        first: State = next(iter(states.values()), {})
        keys = [key for key, value in first.items() if isinstance(value, Tensor) and value.dim() > 0]
        for index, state in states.items():
            full.slices[names[index]][0].update({key: state[key].reshape(-1) for key in keys if key in state})
        scalars = {key: value for key, value in first.items() if key not in keys}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer["param_groups"]]
        return cls(full.slices, scalars=scalars, groups=groups)

    def slice(self, name: str, key: str, start: int, size: int) -> Tensor:
        """Elements ``start`` to ``start + size`` of a flattened tensor of parameter ``name``.

        Returns:
            float32 (size,); zeros where the optimizer has no state yet.

        Raises:
            UsageError: The checkpoint lacks the parameter, or elements of it.
        """
        found = torch.zeros(size, dtype=torch.float32)
        missing = size
        for part in self.slices.get(name, ()):
            first = max(start, part["start"])
            last = min(start + size, part["start"] + part[WEIGHT].numel())
            if first < last:
                if key in part:
                    found[first - start : last - start] = part[key][first - part["start"] : last - part["start"]]
                missing -= last - first
        if missing:
            raise UsageError(f"The checkpoint is of another model: it lacks {missing} of {size} elements of {name}.")
        return found

    def check_same_model(self, shapes: Mapping[str, torch.Size]) -> None:
        """Check that the checkpoint has the parameters in ``shapes``, and no others.

        Raises:
            UsageError: It does not; names the first parameters that differ.
        """
        wrong = [
            f"{name} is {list(shape)} in the model and {list(self.shapes[name])} in the checkpoint"
            if name in self.shapes
            else f"{name} is not in the checkpoint"
            for name, shape in shapes.items()
            if self.shapes.get(name) != shape
        ]
        wrong += [f"{name} is not in the model" for name in self.shapes if name not in shapes]
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UsageError(f"The checkpoint is of another model: {'; '.join(wrong[:3])}{more}.")

    def include(self, weights: Mapping[str, Tensor]) -> None:
        """Add weights that are not partitioned, such as frozen ones."""
        for name, value in weights.items():
            if name not in self.shapes:
                self.slices[name] = [{"start": 0, "shape": value.shape, WEIGHT: value.reshape(-1)}]
                self.shapes[name] = value.shape

    def full_weights(self) -> dict[str, Tensor]:
        """All weights in float32; a tied one under each of its names."""
        weights = {name: self.full_weight(name) for name in self.shapes}
        return weights | {alias: weights[name] for alias, name in self.aliases.items()}

    def full_weight(self, name: str) -> Tensor:
        """One weight in float32."""
        return self.slice(name, WEIGHT, 0, self.shapes[name].numel()).reshape(self.shapes[name])

    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> State:
        """The ``state_dict`` that ``optimizer`` would have under DDP.

        Args:
            optimizer: The optimizer of the module's own parameters.
            names: Names of the parameters by ``id``.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            index: {
                **{key: v.clone() if isinstance(v, Tensor) else v for key, v in self.scalars.items()},
                **{key: self.slice(names[id(p)], key, 0, p.numel()).reshape(p.shape) for key in self.keys},
            }
            for index, p in enumerate(parameters)
            # A frozen parameter's step would not grow, but ZeRO would take it for that of all parameters.
            if p.requires_grad
        }
        groups, first = [], 0
        for group, options in zip(optimizer.param_groups, self.groups, strict=True):
            groups.append({**options, "params": list(range(first, first + len(group["params"])))})
            first += len(group["params"])
        return {"state": state, "param_groups": groups}
