"""Resize and encode images by the options of a packing."""

from dataclasses import dataclass

from torch import Tensor
from torchcodec.encoders import JpegEncoder, PngEncoder
from torchvision.transforms.v2 import functional

from lockstep.data.packed import decode_pixels, encode_pixels

DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored.

    Attributes:
        shorter_side: Pixels of the shorter side of larger images; None: images keep their size.
        quality: Quality of JPEG, from 1 to 100. Without ``shorter_side`` all images are encoded again; with it, those that
            are not larger are stored as they are.
        raw: Store uint8 pixels, (H, W, 3), as ``.npy``.
    """

    shorter_side: int | None = None
    quality: int | None = None
    raw: bool = False

    @property
    def encodes(self) -> bool:
        """Whether the bytes depend on the libraries that resize and encode."""
        return self != ImageOptions()

    def store_file(self, content: bytes, suffix: str) -> tuple[str, bytes]:
        """Field and content of a JPEG or PNG, whose field is ``suffix`` if it is stored as it is.

        Raises:
            RuntimeError, ValueError: It cannot be decoded.
        """
        image = decode_pixels(content)
        resized = self._resize(image)
        is_kept = resized is image and (self.quality is None or self.shorter_side is not None)
        if is_kept and not self.raw:
            return suffix, content
        return self._encode(resized, "jpg")

    def store_pixels(self, image: Tensor) -> tuple[str, bytes]:
        """Field and content of an image, uint8 (1 or 3, H, W): PNG, without loss, if no quality is set."""
        return self._encode(self._resize(image), "png" if self.quality is None else "jpg")

    def _resize(self, image: Tensor) -> Tensor:
        if self.shorter_side is None or min(image.shape[-2:]) <= self.shorter_side:
            return image
        resized: Tensor = functional.resize(image, [self.shorter_side], antialias=True)
        return resized

    def _encode(self, image: Tensor, suffix: str) -> tuple[str, bytes]:
        if self.raw:
            return "npy", encode_pixels(image.expand(3, -1, -1))
        if suffix == "png":
            encoded = PngEncoder(image).to_tensor()
        else:
            encoded = JpegEncoder(image).to_tensor(quality=self.quality or DEFAULT_QUALITY)
        return suffix, encoded.numpy().tobytes()
