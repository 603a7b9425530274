"""Pixels of images, decoded from JPEG or PNG or stored as a NumPy array."""

import functools
import io
import re

import numpy as np
from torch import Tensor
from torchcodec.decoders import decode_image

_MAGIC = b"\x93NUMPY"


def decode_pixels(content: bytes | Tensor) -> Tensor:
    """The pixels of an image, uint8 (3, H, W).

    Args:
        content: A JPEG or PNG; or, as a tensor, uint8 (bytes,), the array of numpy that ``encode_pixels`` writes. The pixels
            are then a view of it.

    Raises:
        RuntimeError, ValueError: ``content`` is damaged, or of another format.
    """
    if isinstance(content, bytes):
        return decode_image(content, mode="RGB")
    start = len(_MAGIC) + 4
    begin = content[:start].numpy().tobytes()
    if not begin.startswith(_MAGIC):
        raise ValueError("not an array of numpy")
    end = start + int.from_bytes(begin[-2:], "little")
    shape = _shape(content[:end].numpy().tobytes())
    return content[end:].view(shape).permute(2, 0, 1)  # in memory it lies like a decoded image


def explain(error: Exception) -> str:
    """The reason of a decoder's error, without the location in the decoder's source."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^.*(: |:\d+, )", "", line).rstrip(".")


def encode_pixels(image: Tensor) -> bytes:
    """An image, uint8 (3, H, W), as an array of numpy, uint8 (H, W, 3), in the format ``.npy``."""
    content = io.BytesIO()
    np.save(content, image.permute(1, 2, 0).contiguous().numpy(), allow_pickle=False)
    return content.getvalue()


@functools.lru_cache(1024)
def _shape(header: bytes) -> tuple[int, int, int]:
    """Height, width and channels from the header of an array; cached, as numpy takes a tenth of a decoding to read it."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another version than 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran or dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"an array {dtype} {shape}, and not uint8 (height, width, 3)")
    return shape
