"""JPEGs that the GPU decodes: workers read them and choose their crops, nvJPEG decodes a batch at once."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchcodec.decoders import decode_jpeg

from lockstep.core import UsageError
from lockstep.data.decode import Crop, CropRule, JpegHeader, decode_crop
from lockstep.data.file_index import printable
from lockstep.data.loading import preserve_rng_state, seed_cpu
from lockstep.data.packed import explain

log = logging.getLogger(__name__)

_END, _TAIL = b"\xff\xd9", 1024
"""The end marker of a JPEG, and how many last bytes may hold it: some programs append bytes."""


class EncodedCrop(NamedTuple):
    """A JPEG, uint8 (bytes,), its crop, its path for messages, and the seed of its transforms; -1: none."""

    data: Tensor
    crop: Crop
    place: str
    seed: int = -1


class EncodedBatch(NamedTuple):
    """The images of a batch, most of them as JPEGs.

    Attributes:
        data: All JPEGs one after another, uint8 (bytes,).
        lengths: Their lengths, int64 (J,).
        crops: Their ``Crop``s, int64 (J, 5).
        seeds: Seeds of their transforms, int64 (J,); -1: none.
        numbers: Their places in the batch, int64 (J,).
        places: Their paths, for messages.
        others: The other images, which the CPU has decoded, uint8 (B - J, 3, size, size).
    """

    data: Tensor
    lengths: Tensor
    crops: Tensor
    seeds: Tensor
    numbers: Tensor
    places: list[str]
    others: list[Tensor]

    @classmethod
    def collate(cls, images: Sequence[EncodedCrop | Tensor]) -> "EncodedBatch":
        """A batch of ``images``."""
        jpegs = {number: image for number, image in enumerate(images) if isinstance(image, EncodedCrop)}
        return cls(
            torch.cat([image.data for image in jpegs.values()]) if jpegs else torch.zeros(0, dtype=torch.uint8),
            torch.tensor([len(image.data) for image in jpegs.values()], dtype=torch.int64),
            torch.tensor([image.crop for image in jpegs.values()], dtype=torch.int64),
            torch.tensor([image.seed for image in jpegs.values()], dtype=torch.int64),
            torch.tensor(list(jpegs), dtype=torch.int64),
            [image.place for image in jpegs.values()],
            [image for image in images if isinstance(image, Tensor)],
        )

    def decode(
        self, size: int, device: torch.device, transforms: Sequence[nn.Module]
    ) -> tuple[Tensor, dict[int, tuple[str, Exception]]]:
        """Decode the JPEGs on ``device``, and apply ``transforms`` to them.

        Returns:
            All images, uint8 (B, 3, size, size), and those that could not be decoded: number in the batch, place and reason.
        """
        numbers, errors = self.numbers.tolist(), dict[int, Exception]()
        crops = [Crop(*crop) for crop in self.crops.tolist()]
        decoded = zip(self._decode(device, errors), crops, strict=True)
        jpegs = transform_each([resize_on_device(*each, size) for each in decoded], transforms, self.seeds.tolist())
        batch = [image.to(device) for image in self.others]
        for number, image in zip(numbers, jpegs, strict=True):  # in ascending order
            batch.insert(number, image)
        return torch.stack(batch), {numbers[jpeg]: (self.places[jpeg], error) for jpeg, error in errors.items()}

    def _decode(self, device: torch.device, errors: dict[int, Exception]) -> list[Tensor]:
        """The decoded JPEGs, uint8 (3, H, W)."""
        sources = torch.split(self.data, self.lengths.tolist())
        try:
            return list(decode_jpeg(list(sources), mode="RGB", device=device)) if sources else []
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the error does not name the JPEG
            return [self._decode_alone(number, source, device, errors) for number, source in enumerate(sources)]

    def _decode_alone(self, number: int, source: Tensor, device: torch.device, errors: dict[int, Exception]) -> Tensor:
        """A JPEG that nvJPEG or else the CPU decodes; else a black image, with the reason in ``errors``."""
        try:
            return decode_jpeg([source], mode="RGB", device=device)[0]
        except torch.OutOfMemoryError:  # the pixels of the CPU would differ
            raise
        except RuntimeError as error:
            reason = explain(error)
        try:
            image = decode_jpeg([source], mode="RGB")[0]
        except RuntimeError as error:
            errors[number] = error
            return torch.zeros(3, *self.crops[number, :4].view(2, 2).sum(0).tolist(), dtype=torch.uint8, device=device)
        log.warning("nvJPEG cannot decode %s (%s); the CPU decodes it", self.places[number], reason)
        return image.to(device)


@dataclass(frozen=True)
class Decoder:
    """Decodes the crop of an image that ``rule`` chooses, or leaves a JPEG to the GPU.

    Args:
        rule: Chooses the crop.
        size: Height and width of the result, in pixels.
        on_gpu: Whether the GPU decodes JPEGs.
    """

    rule: CropRule
    size: int
    on_gpu: bool = False

    def __call__(self, data: bytes | Tensor, place: Callable[[int], str], index: int) -> EncodedCrop | Tensor:
        """The crop of image ``index`` with the content ``data``, uint8 (3, size, size); see ``decode_crop``."""
        header = JpegHeader.read(data) if self.on_gpu and isinstance(data, bytes) else None
        if isinstance(data, Tensor) or header is None or header.channels not in (1, 3) or _END not in data[-_TAIL:]:
            return decode_crop(data, self.rule, self.size)
        crop = self.rule(header.height, header.width)
        return EncodedCrop(torch.from_numpy(np.array(np.frombuffer(data, np.uint8))), crop, printable(place(index)))


def resize_on_device(image: Tensor, crop: Crop, size: int) -> Tensor:
    """``crop`` of ``image``, uint8 (3, H, W) on any device, as uint8 (3, size, size), bilinear and antialiased."""
    box = image[None, :, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].float()
    resized = interpolate(box, (size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255).to(torch.uint8)
    return (resized.flip(3) if crop.is_flipped else resized)[0]


def transform_each(images: Sequence[Tensor], transforms: Sequence[nn.Module], seeds: Sequence[int]) -> list[Tensor]:
    """``images`` after ``transforms``, each with random numbers of its own seed, on any device."""
    cuda = [image.device for image in images[:1] if image.is_cuda]
    transformed = []
    with preserve_rng_state(), torch.random.fork_rng(cuda, enabled=bool(cuda)):
        for image, seed in zip(images, seeds, strict=True):
            if seed >= 0:
                seed_cpu(seed)
                if cuda:
                    torch.cuda.manual_seed(seed)
                for transform in transforms:
                    image = transform(image)
            transformed.append(image)
    return transformed


def check_gpu_decoding(device: torch.device) -> None:
    """Raise UsageError if JPEGs cannot be decoded on ``device``."""
    if device.type != "cuda":
        raise UsageError(
            f"data.decode: gpu needs a CUDA GPU, and this run computes on the {device.type}; set --data.decode cpu."
        )
    try:
        decode_jpeg([torch.from_numpy(np.frombuffer(bytearray(_sample()), np.uint8))], mode="RGB", device=device)
    except RuntimeError as error:
        raise UsageError(f"data.decode: nvJPEG fails on {device} ({explain(error)}); set --data.decode cpu.") from error


def _sample() -> bytes:
    encoded: bytes = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    return encoded
