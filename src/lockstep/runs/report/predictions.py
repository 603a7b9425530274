"""A sample of ``predictions.safetensors`` for the report; numpy is imported when it is needed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

_TYPES = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "U32": "u4", "I32": "i4", "U64": "u8", "I64": "i8"}
_FLOATS = {"F16": "f2", "BF16": "u2", "F32": "f4", "F64": "f8"}

_MAX_VALUES = 1_000_000
"""Values of each tensor that are read: a histogram of these looks like that of all."""


@dataclass(frozen=True)
class Predicted:
    """A tensor of predictions.

    Attributes:
        shape: Of the whole tensor; the first dimension is the sample.
        values: Its first samples, with the same number of dimensions; None where numpy lacks its type.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    values: "numpy.ndarray[Any, Any] | None"

    @property
    def is_float(self) -> bool:
        return self.kind in _FLOATS

    @property
    def are_probabilities(self) -> bool:
        """Whether each sample is a distribution over classes."""
        if self.values is None or not self.is_float or len(self.shape) != 2 or self.shape[1] < 2 or not len(self.values):
            return False
        return bool(self.values.min() >= 0 and abs(self.values.sum(1) - 1).max() < 0.02)


def read_predictions(path: Path) -> list[Predicted]:
    """The tensors of a safetensors file; only their first samples are read.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    return [_read(path, 8 + length, name, entry) for name, entry in header.items() if name != "__metadata__"]


def _read(path: Path, begin: int, name: str, entry: dict[str, Any]) -> Predicted:
    import numpy

    kind, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
    if (code := {**_TYPES, **_FLOATS}.get(kind)) is None or not shape:
        return Predicted(name, kind, shape, None)
    row = int(numpy.prod(shape[1:]))
    rows = min(shape[0], max(1, _MAX_VALUES // max(1, row)))
    with path.open("rb") as file:
        file.seek(begin + int(entry["data_offsets"][0]))
        values = numpy.fromfile(file, numpy.dtype(f"<{code}" if code != "?" else code), rows * row)
    if kind == "BF16":  # the upper half of a float32
        values = (values.astype("<u4") << 16).view("<f4")
    return Predicted(name, kind, shape, values.astype("f8" if kind in _FLOATS else values.dtype).reshape(rows, *shape[1:]))
