"""Decode, crop and resize one image; of a JPEG, decode only the rows and the resolution that the crop needs."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from lockstep.data.packed import decode_pixels

_MCU = 16
"""Rows of the usual blocks of a JPEG."""

_REST = re.compile(r"extraneous bytes before marker 0xd[0-79]")
"""libjpeg's warning about rows beyond the height in the header."""


class Crop(NamedTuple):
    """A box of an image, in pixels of the image, that is resized to a square, and mirrored if ``is_flipped``."""

    top: int
    left: int
    height: int
    width: int
    is_flipped: bool = False


CropRule = Callable[[int, int], Crop]
"""Chooses the crop of an image from its height and width."""


def random_crop(height: int, width: int) -> Crop:
    """8 % to 100 % of an image, with sides of 3:4 to 4:3, mirrored or not, drawn with ``random`` (Szegedy et al. 2015)."""
    is_flipped = random.random() < 0.5
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            return Crop(random.randint(0, height - rows), random.randint(0, width - columns), rows, columns, is_flipped)
    rows, columns = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return Crop((height - rows) // 2, (width - columns) // 2, rows, columns, is_flipped)


def center_crop(height: int, width: int) -> Crop:
    """The square in the center, with 7/8 of the shorter side: 224 of 256 pixels (torchvision's reference training)."""
    side = max(1, min(height, width) * 7 // 8)
    return Crop((height - side) // 2, (width - side) // 2, side, side)


@dataclass(frozen=True)
class JpegHeader:
    """The header of a JPEG.

    Attributes:
        height, width: Size in pixels.
        channels: 1 for grey, 3 for colour, 4 for CMYK.
        is_sequential: Whether the rows are compressed one after another; else the JPEG is progressive or of a rare kind.
        height_at: Position of the two bytes of the height.
    """

    height: int
    width: int
    channels: int
    is_sequential: bool
    height_at: int

    @classmethod
    def read(cls, data: bytes) -> "JpegHeader | None":
        """The header of ``data``; None if ``data`` is not a JPEG."""
        at, end = 2, len(data) - 9
        if data[:2] != b"\xff\xd8":
            return None
        while at < end and data[at] == 0xFF:
            marker = data[at + 1]
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
                return cls(height, width, data[at + 9], marker in (0xC0, 0xC1), at + 5) if height and width else None
            at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
        return None


def decode_crop(data: bytes | Tensor, rule: CropRule, size: int) -> Tensor:
    """The crop that ``rule`` chooses of an image, uint8 (3, size, size), in channels-last layout.

    The result depends on ``data`` and the crop alone. The pixels of a JPEG are those of libjpeg-turbo. Its rows below the crop
    are not decoded. A crop at least twice as large as ``size`` is decoded at 1/2, 1/4 or 1/8 of the resolution, directly from
    the DCT coefficients.

    Args:
        data: A JPEG or PNG; or an array of pixels, see ``decode_pixels``.

    Raises:
        RuntimeError, ValueError: ``data`` is not a complete image.
    """
    header = JpegHeader.read(data) if isinstance(data, bytes) else None
    if isinstance(data, bytes) and header is not None and header.channels in (1, 3):
        crop = rule(header.height, header.width)
        scale = _scale(crop, size)
        pixels = _decode_jpeg(data, header, crop, scale)
        if pixels is not None:
            return resize_crop(torch.from_numpy(pixels), _scaled(crop, scale), size)
        return resize_crop(_decode_all(data), crop, size)
    image = _decode_all(data)
    return resize_crop(image, rule(*image.shape[:2]), size)


def resize_crop(image: Tensor, crop: Crop, size: int) -> Tensor:
    """``crop`` of ``image``, uint8 (H, W, 3), as uint8 (3, size, size) in channels-last layout, bilinear and antialiased."""
    box = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    # torch resizes uint8 in channels-last layout about twice as fast, and recognizes it by the strides of all four axes.
    batch = box.contiguous().unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(batch, (size, size), mode="bilinear", antialias=True)
    return (resized.flip(3) if crop.is_flipped else resized)[0]


def _scale(crop: Crop, size: int) -> int:
    """The largest of 8, 4, 2 and 1 at which the crop still has ``size`` pixels on each side."""
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or min(crop.height, crop.width) >= scale * size)


def _scaled(crop: Crop, scale: int) -> Crop:
    top, left, height, width, is_flipped = crop
    return Crop(top // scale, left // scale, height // scale, width // scale, is_flipped)


def _decode_jpeg(data: bytes, header: JpegHeader, crop: Crop, scale: int) -> NDArray[np.uint8] | None:
    """Pixels, uint8 (H, W, 3), at 1/``scale`` of the resolution, at least down to the crop; None if libjpeg warns."""
    # The upsampling of colour also reads the row below the crop, at 1/``scale`` of the resolution.
    rows = -(-(crop.top + crop.height + 2 * scale) // _MCU) * _MCU
    if is_cut := header.is_sequential and rows < header.height:
        data = b"".join((data[: header.height_at], rows.to_bytes(2), data[header.height_at + 2 :]))
    else:
        rows = header.height
    height, width = -(-rows // scale), -(-header.width // scale)
    pixels = np.empty((height, width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, buffer=pixels)
    except ValueError as error:
        # This warning alone means that all rows up to the reduced height are decoded and the file has its end marker.
        if not (is_cut and _REST.search(str(error))):
            return None
    return pixels


def _decode_all(data: bytes | Tensor) -> Tensor:
    """All pixels, uint8 (H, W, 3)."""
    return decode_pixels(data).permute(1, 2, 0)
