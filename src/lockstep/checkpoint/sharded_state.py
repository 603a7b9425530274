"""What ZeRO has shared out, saved so that it knows no ranks: slices of each weight, and of what the optimizer keeps for it.

A rank's ``shard-N.pt`` holds ``slices`` (by the parameter's name: ``start``, and one-dimensional float32 tensors: ``weight``,
and what the optimizer keeps, such as ``exp_avg``), ``scalars`` (what the optimizer keeps once, such as ``step``), ``groups``
(its options), the loss ``scaler`` and ``counters`` of the engine. Whoever reads takes what it needs from the files of all
ranks: any number of ranks, any stage, and DDP.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.checkpoint.serialization import State
from lockstep.core import UsageError

WEIGHT = "weight"


def parameter_names(module: nn.Module) -> dict[int, str]:
    """The names of parameters by their ``id``; the first one of those that are tied."""
    return {id(p): name for name, p in module.named_parameters()}


class ShardedState:
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
    def of(cls, folder: Path) -> "ShardedState | None":
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
    def from_full_state(
        cls, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any] | None, names: Sequence[str]
    ) -> "ShardedState":
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

    def check_same_model(self, shapes: Mapping[str, torch.Size]) -> None:
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
