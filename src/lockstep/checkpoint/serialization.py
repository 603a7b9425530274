"""What of a rank lightning's checkpoint leaves out: random numbers, metrics, and what was logged but not yet reduced.

Plain tensors and numbers only, so that it loads with ``weights_only``.
"""

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.core import RunError

State = dict[str, Any]


def copy_to_cpu(value: Any) -> Any:
    """A copy of ``value``, however nested, whose tensors are on the CPU and shared with nobody."""
    return _map_tensors(value, lambda tensor: tensor.detach().to("cpu", copy=True))


def _map_tensors(value: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """``value``, however nested, with what ``make`` makes of its tensors."""
    if isinstance(value, Tensor):
        return make(value)
    if isinstance(value, dict):
        return type(value)((key, _map_tensors(item, make)) for key, item in value.items())
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_map_tensors(item, make) for item in value)
    return value


def to_plain_types(value: Any) -> Any:
    """``value`` without what ``torch.load(weights_only=True)`` would refuse."""
    if value is None or isinstance(value, bool | int | float | str | Tensor | torch.dtype):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain_types(item) for item in value]
    return str(value)


def allow_numpy_globals() -> None:
    """Let ``torch.load(weights_only=True)`` load arrays and numbers of numpy, of which states of one's own are often made."""
    kinds = [kind for name, kind in vars(np.dtypes).items() if name.endswith("DType") and name != "ObjectDType"]
    multiarray: Any = import_module("numpy._core.multiarray")
    torch.serialization.add_safe_globals([np.ndarray, np.dtype, multiarray.scalar, multiarray._reconstruct, *kinds])


def check_loadable(state: Mapping[str, Any]) -> None:
    """Raise a RunError if ``torch.load(weights_only=True)`` would refuse ``state``: a run must not train for what is lost."""
    if (found := _find_unloadable(state, "")) is not None:
        place, reason = found
        named = re.search(r"GLOBAL (\S+)", reason)
        what = named[1] if named else " ".join(reason.split())
        raise RunError(
            f"A checkpoint cannot hold {place} ({what}): torch.load(weights_only=True) would refuse it; "
            "give tensors, numbers, texts, lists and dicts there (in state_dict or on_save_checkpoint)."
        )


def _find_unloadable(value: Any, place: str) -> tuple[str, str] | None:
    """Where in ``value`` it is that cannot be loaded, and why; None if all of it can."""
    file = BytesIO()
    try:
        torch.save(_map_tensors(value, lambda tensor: tensor.detach().to("meta")), file)
        file.seek(0)
        torch.load(file, weights_only=True)
        return None
    except Exception as error:  # pickle raises what it likes
        if isinstance(value, dict):
            for key, item in value.items():
                if (found := _find_unloadable(item, f"{place}[{key!r}]")) is not None:
                    return found
        return place, str(error)
