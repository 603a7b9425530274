"""Values that ``torch.load(weights_only=True)`` accepts, and copies of them on the CPU."""

import re
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core import RunError

State = dict[str, Any]


def copy_to_cpu(value: Any) -> Any:
    """A copy of a nested ``value`` whose tensors are on the CPU and share no memory with the original."""
    return _map_tensors(value, lambda tensor: tensor.detach().to("cpu", copy=True))


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a nested ``value`` with ``function`` applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return type(value)((key, _map_tensors(item, function)) for key, item in value.items())
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_map_tensors(item, function) for item in value)
    return value


def to_plain_types(value: Any) -> Any:
    """A copy of a nested ``value`` in which ``str(item)`` replaces what ``torch.load(weights_only=True)`` would refuse."""
    if value is None or isinstance(value, bool | int | float | str | Tensor | torch.dtype):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain_types(item) for item in value]
    return str(value)


def allow_numpy_globals() -> None:
    """Let ``torch.load(weights_only=True)`` load arrays and numbers of numpy, which the state of user code often contains."""
    dtypes = [kind for name, kind in vars(np.dtypes).items() if name.endswith("DType") and name != "ObjectDType"]
    constructors: list[Any] = [value.__reduce__()[0] for value in (np.empty(0), np.float64(0))]  # what pickle calls for them
    torch.serialization.add_safe_globals([np.ndarray, np.dtype, *constructors, *dtypes])


def check_loadable(state: Mapping[str, Any]) -> None:
    """Check before training goes on that a checkpoint with ``state`` could be loaded.

    Raises:
        RunError: ``torch.load(weights_only=True)`` would refuse it; names the place in ``state``.
    """
    if (found := _find_unloadable(state, "")) is not None:
        place, reason = found
        refused = re.search(r"GLOBAL (\S+)", reason)
        raise RunError(
            f"A checkpoint cannot hold {place} ({refused[1] if refused else ' '.join(reason.split())}): torch.load(weights_only"
            "=True) would refuse it; save tensors, numbers, strings, lists and dicts (in state_dict or on_save_checkpoint)."
        )


def _find_unloadable(value: Any, place: str) -> tuple[str, str] | None:
    """The place in ``value`` of what cannot be loaded, and the reason; None if all of it can."""
    file = BytesIO()
    try:
        torch.save(_map_tensors(value, lambda tensor: tensor.detach().to("meta")), file)
        file.seek(0)
        torch.load(file, weights_only=True)
        return None
    except Exception as error:  # pickle may raise anything
        if isinstance(value, dict):
            for key, item in value.items():
                if (found := _find_unloadable(item, f"{place}[{key!r}]")) is not None:
                    return found
        return place, str(error)
