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

from lockstep.compat.deepspeed import full_shape
from lockstep.core import UsageError

State = dict[str, Any]
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
    """

    slices: dict[str, list[State]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    scalars: State = field(default_factory=dict)
    groups: list[State] = field(default_factory=list)
    scaler: State = field(default_factory=dict)
    counters: State = field(default_factory=dict)

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
        return cls(**{**shards[0], "slices": slices})

    @property
    def keys(self) -> list[str]:
        """Names of the optimizer's tensors, such as ``exp_avg``."""
        names = {key for parts in self.slices.values() for part in parts for key in part}
        return sorted(names - {"start", "shape", WEIGHT})

    def include_weights(self, state_dict: Mapping[str, Tensor], module: nn.Module) -> None:
        """Add the weights in ``state_dict`` that are not partitioned, such as frozen ones; now all must be those of ``module``.

        Raises:
            UsageError: They are not; names the first parameters that differ.
        """
        shapes = {name: full_shape(p) for name, p in module.named_parameters()}
        for name, value in state_dict.items():
            if name in shapes and name not in self.slices:
                self.slices[name] = [{"start": 0, "shape": value.shape, WEIGHT: value.reshape(-1)}]
        saved = {name: torch.Size(parts[0]["shape"]) for name, parts in self.slices.items()}
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
        keys = [key for key, value in first.items() if isinstance(value, Tensor) and value.dim() > 0]
        for index, state in states.items():
            self.slices[names[index]][0].update({key: state[key].reshape(-1) for key in keys if key in state})
        self.scalars = {key: value for key, value in first.items() if key not in keys}
        self.groups = [{k: v for k, v in group.items() if k != "params"} for group in state_dict["param_groups"]]

    def slice(self, name: str, key: str, start: int, size: int) -> Tensor:
        """Elements ``start`` to ``start + size`` of a flattened tensor, in float32; zeros without optimizer state yet.

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

    def full_tensor(self, name: str, key: str = WEIGHT) -> Tensor:
        """One weight in float32, or what the optimizer keeps for it under ``key``."""
        shape = torch.Size(self.slices[name][0]["shape"])
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
            # A frozen parameter's step would not grow, but ZeRO would take it for that of all parameters.
            if p.requires_grad
        }
        groups = zip(optimizer.state_dict()["param_groups"], self.groups, strict=True)
        return {"state": state, "param_groups": [{**options, "params": group["params"]} for group, options in groups]}
