"""The fields of a sample of any dataset, named and encoded by the conventions of WebDataset."""

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from lockstep.pack.images import ImageOptions

_PLAIN = ("image", "img", "label")
"""Names that the kind of the value replaces."""

_SAME_KIND = {
    "cls": ("cls2", "index", "id", "count"),
    "txt": ("text", "cls", "json"),
    "bin": (
        *("cls", "txt", "text", "json", "npy", "npz", "pth", "pickle", "pyd"),
        *("mp", "msgpack", "cbor", "mp4", "wav", "flac", "webp"),
    ),
}
"""Other names that a value of a kind may have, as in WebDataset."""

_IMAGES = ("jpg", "jpeg", "png", "npy")

_MAGICS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png"}


def encode_sample(sample: Any, options: ImageOptions) -> dict[str, bytes]:
    """The content of the fields of a sample, by their names.

    The values of a tuple are named by their kind: an image ``png``, or ``jpg`` with a quality; an integer ``cls``; a text
    ``txt``; an array, or an image of more than 8 bits, ``npy``; bytes ``bin``; others ``json``. The position precedes the kind
    of a second one: ``2.npy``. The names of a mapping are kept if they end with a kind, as ``jpg`` does; else the kind follows
    them, as in ``mask.png``.

    Raises:
        TypeError, ValueError: A value cannot be encoded.
    """
    fields: dict[str, bytes] = {}
    for name, value in _named_values(sample):
        kind, content = _encode(value, options)
        last = name.rpartition(".")[2].lower()
        if name.isdigit():
            name = kind if kind not in fields else f"{name}.{kind}"
        elif name in _PLAIN:
            name = kind
        elif last in _IMAGES and kind in _IMAGES:  # its encoding differs from its name
            name = f"{name[: -len(last)]}{kind}"
        elif last != kind and last not in _SAME_KIND.get(kind, ()):
            name = f"{name}.{kind}"
        if "/" in name or name in fields:
            raise ValueError(f"{name!r} cannot be the name of a field" if "/" in name else f"two fields are named {name}")
        fields[name] = content
    return fields


def _named_values(sample: Any) -> Iterator[tuple[str, Any]]:
    """Names and values; those of a tuple are named by their positions."""
    if isinstance(sample, Mapping):
        yield from ((str(name), value) for name, value in sample.items() if not str(name).startswith("__"))
    elif isinstance(sample, tuple | list):
        yield from ((str(position), value) for position, value in enumerate(sample))
    else:
        yield "0", sample


def _encode(value: Any, options: ImageOptions) -> tuple[str, bytes]:
    """Kind and content of a value."""
    if isinstance(value, bytes):
        kind = next((kind for magic, kind in _MAGICS.items() if value.startswith(magic)), "bin")
        return ("bin", value) if kind == "bin" else options.store_file(value, kind)
    if isinstance(value, Image.Image) and value.mode[0] in "IF":  # RGB would clip its 16 or 32 bits to 8
        value = np.asarray(value)
    if isinstance(value, Image.Image):
        return options.store_pixels(functional.pil_to_tensor(value if value.mode in ("L", "RGB") else value.convert("RGB")))
    if isinstance(value, str):
        return "txt", value.encode()
    if isinstance(value, Tensor | np.ndarray | np.generic):
        array = value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
        if not array.ndim and np.issubdtype(array.dtype, np.integer):
            return "cls", b"%d" % int(array)
        if isinstance(value, Tensor) and array.dtype == np.uint8 and array.ndim == 3 and array.shape[0] in (1, 3):
            return options.store_pixels(value)
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        return "npy", content.getvalue()
    if isinstance(value, int) and not isinstance(value, bool):
        return "cls", b"%d" % value
    return "json", json.dumps(value, ensure_ascii=False).encode()
