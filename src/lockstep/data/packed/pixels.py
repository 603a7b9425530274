"""Pixels of images: of JPEG and PNG, and stored as they are, as an array of numpy."""

import functools
import io
import re

import numpy as np
import torch
from torch import Tensor
from torchcodec.decoders import decode_image

_MAGIC = b"\x93NUMPY"


def decode_pixels(content: bytes) -> Tensor:
    """The pixels of a JPEG or PNG, or of an array of numpy, uint8 (H, W, 3), as an image, uint8 (3, H, W).

    Raises:
        RuntimeError, ValueError: It is damaged, or something else.
    """
    if not content.startswith(_MAGIC):
        return decode_image(content, mode="RGB")
    start = len(_MAGIC) + 2
    end = start + 2 + int.from_bytes(content[start : start + 2], "little")
    height, width, channels = _shape(content[:end])
    # A copy: what is read may be changed. In memory it lies like a decoded image.
    pixels = torch.frombuffer(bytearray(memoryview(content)[end:]), dtype=torch.uint8)
    return pixels.view(height, width, channels).permute(2, 0, 1)


def explain(error: Exception) -> str:
    """The reason in an error of a decoder, without its place in the source of the decoder."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^.*(: |:\d+, )", "", line).rstrip(".")


def encode_pixels(image: Tensor) -> bytes:
    """An image, uint8 (3, H, W), as an array of numpy, uint8 (H, W, 3), in the format ``.npy``."""
    content = io.BytesIO()
    np.save(content, image.permute(1, 2, 0).contiguous().numpy(), allow_pickle=False)
    return content.getvalue()


@functools.lru_cache(1024)
def _shape(header: bytes) -> tuple[int, int, int]:
    """Height, width and channels that the header of an array tells; numpy takes a tenth of a decoding to read it."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another version than 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran or dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"an array {dtype} {shape}, and not uint8 (height, width, 3)")
    return shape
