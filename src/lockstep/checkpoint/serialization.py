"""Values that ``torch.load(weights_only=True)`` accepts, and copies of them on the CPU."""

import copy
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from io import BytesIO
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lockstep.core import RunError, UsageError


def copy_to_cpu(value: Any) -> Any:
    """A copy of a nested ``value`` whose tensors are on the CPU; it shares no memory with the original."""
    return _map_tensors(value, lambda tensor: tensor.detach().to("cpu", copy=True), _copy_mutable)


def _copy_mutable(value: Any) -> Any:
    is_mutable = isinstance(value, np.ndarray | set | bytearray | tuple) or is_dataclass(value)
    return copy.deepcopy(value) if is_mutable else value


def count_bytes(value: Any) -> int:
    """Bytes of the tensors in a nested ``value``."""
    sizes: list[int] = []

    def add(tensor: Tensor) -> Tensor:
        parts = (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,)
        sizes.extend(part.nbytes for part in parts)
        return tensor

    _map_tensors(value, add)
    return sum(sizes)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor], other: Callable[[Any], Any] = lambda value: value) -> Any:
    """A copy of a nested ``value`` with ``function`` applied to each tensor, ``other`` to all but dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        copied = copy.copy(value)  # the constructors of its subclasses differ
        for key, item in value.items():
            copied[key] = _map_tensors(item, function, other)
        return copied
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_map_tensors(item, function, other) for item in value)
    return other(value)


def to_plain_types(value: Any) -> Any:
    """A copy of a nested ``value`` that ``torch.load(weights_only=True)`` accepts; ``str(item)`` replaces other objects."""
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor | torch.dtype):
        return value
    if isinstance(value, Real):  # torch.load refuses subclasses of numbers, such as np.float64
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain_types(item) for item in value]
    return str(value)


def allow_numpy_globals() -> None:
    """Let ``torch.load(weights_only=True)`` load frozen sets, and arrays and numbers of numpy, which user code often saves."""
    dtypes = [kind for name, kind in vars(np.dtypes).items() if name.endswith("DType") and name != "ObjectDType"]
    constructors: list[Any] = [value.__reduce__()[0] for value in (np.empty(0), np.float64(0))]  # what pickle calls for them
    torch.serialization.add_safe_globals([frozenset, np.ndarray, np.dtype, *constructors, *dtypes])


def allow_plain_classes(*files: Path | BinaryIO) -> None:
    """Let ``torch.load(weights_only=True)`` load the enums, dataclasses and named tuples in ``files``.

    Only classes of modules that are imported: reading a file never imports code.
    """
    for file in files:
        for path in _refused_globals(file):
            module, _, name = path.rpartition(".")
            found = getattr(sys.modules.get(module), name, None)
            is_tuple = isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")
            if isinstance(found, type) and (is_tuple or issubclass(found, Enum) or is_dataclass(found)):
                torch.serialization.add_safe_globals([found])


def _refused_globals(file: Path | BinaryIO) -> list[str]:
    """Import paths in ``file`` that ``torch.load(weights_only=True)`` refuses; none for the format before torch 1.6."""
    if not zipfile.is_zipfile(file):
        return []
    if not isinstance(file, Path):
        file.seek(0)
    return torch.serialization.get_unsafe_globals_in_checkpoint(file)


class _Placeholder:
    """Replaces an object that ``torch.load(weights_only=True)`` refuses."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def load_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of the ``state_dict`` in Lightning's checkpoint ``file``, on the CPU; other objects are ignored."""
    with torch.serialization.safe_globals([(_Placeholder, name) for name in _refused_globals(file)]):
        state_dict = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}


def check_states(trainer: Trainer) -> None:
    """Raise a UsageError if a checkpoint cannot hold a ``state_dict``; each save checks what ``on_save_checkpoint`` adds."""
    owners = [trainer.lightning_module, getattr(trainer, "datamodule", None), *trainer.callbacks]  # type: ignore[attr-defined]
    for owner in filter(None, owners):
        try:
            check_loadable({type(owner).__name__: owner.state_dict()})
        except RunError as error:
            raise UsageError(error.message) from None


def check_loadable(value: Any, place: str = "") -> None:
    """Raise a RunError if ``torch.load(weights_only=True)`` would refuse ``value``; it names the ``place`` of the cause."""
    file = BytesIO()
    try:
        torch.save(_map_tensors(value, lambda tensor: tensor.detach().to("meta")), file)
        file.seek(0)
        allow_plain_classes(file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # pickle may raise anything
        for key, item in value.items() if isinstance(value, dict) else ():
            check_loadable(item, f"{place}[{key!r}]")
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise RunError(
            f"A checkpoint cannot hold {place} ({refused[1] if refused else ' '.join(str(error).split())}): torch.load("
            "weights_only=True) would refuse it; save tensors, arrays, numbers, strings, lists, dicts, sets, enums and "
            "dataclasses (in state_dict or on_save_checkpoint)."
        ) from None
