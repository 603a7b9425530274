"""Values that ``torch.load(weights_only=True)`` accepts, and copies of them on the CPU."""

import re
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core import RunError


def copy_to_cpu(value: Any) -> Any:
    """A copy of a nested ``value`` whose tensors are on the CPU and share no memory with the original."""
    return _map_tensors(value, lambda tensor: tensor.detach().to("cpu", copy=True))


def count_bytes(value: Any) -> int:
    """Bytes of the tensors in a nested ``value``."""
    sizes: list[int] = []
    _map_tensors(value, lambda tensor: sizes.append(tensor.nbytes) or tensor)  # type: ignore[func-returns-value]
    return sum(sizes)


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


def check_loadable(value: Any, place: str = "") -> None:
    """Raise a RunError if ``torch.load(weights_only=True)`` would refuse ``value``; it names the ``place`` of the cause."""
    file = BytesIO()
    try:
        torch.save(_map_tensors(value, lambda tensor: tensor.detach().to("meta")), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # pickle may raise anything
        for key, item in value.items() if isinstance(value, dict) else ():
            check_loadable(item, f"{place}[{key!r}]")
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise RunError(
            f"A checkpoint cannot hold {place} ({refused[1] if refused else ' '.join(str(error).split())}): torch.load("
            "weights_only=True) would refuse it; save tensors, numbers, strings, lists and dicts (in state_dict or "
            "on_save_checkpoint)."
        ) from None
