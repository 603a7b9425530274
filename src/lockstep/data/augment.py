"""Augmentation of training samples: transforms of one image, and MixUp and CutMix of pairs."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lockstep.core import UsageError
from lockstep.data.encoded import EncodedCrop


class Blend(NamedTuple):
    """How a sample is mixed with its partner.

    Attributes:
        share: Weight of its own label; the partner's label has the rest.
        opacity: Weight of its own image outside the box.
        top, left, bottom, right: The box, in pixels, that comes from the partner.
    """

    share: float
    opacity: float
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0


class Blends(NamedTuple):
    """The ``Blend`` of each sample of a batch, float32 (B, 6), and its slot in this rank's batch, int64 (B,), ascending.

    The slot of a file that cannot be decoded is missing.
    """

    values: Tensor
    slots: Tensor

    @classmethod
    def collate(cls, blends: Sequence[Blend], slots: Sequence[int]) -> "Blends":
        """The blends of a batch."""
        return cls(torch.tensor(blends, dtype=torch.float32), torch.tensor(slots))

    def select(self, kept: Tensor) -> "Blends":
        """The blends of the samples ``kept``, int64 (n,)."""
        return Blends(self.values[kept], self.slots[kept])

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The partner of each sample, int64 (B,), and the blend of the first of both, float32 (B, 6).

        Slots 0 and 1 are a pair, as are 2 and 3, and so on. Each rank has an even number of slots, so the pairs do not depend
        on the number of ranks. A sample whose neighbour is missing is its own partner.
        """
        slots, numbers = self.slots, torch.arange(len(self.slots), device=self.slots.device)
        is_first = (slots % 2 == 0) & (slots.roll(-1) == slots + 1)
        is_second = (slots % 2 == 1) & (slots.roll(1) == slots - 1)
        first = numbers - is_second.long()
        return first + is_first.long(), self.values[first]


@dataclass(frozen=True)
class Mixing:
    """MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019) of neighbours in the global batch.

    Args:
        mixup: Alpha of MixUp; 0: never.
        cutmix: Alpha of CutMix; 0: never. With both, each pair draws one of them.
        height, width: Size of the images, in pixels.
    """

    mixup: float
    cutmix: float
    height: int
    width: int

    def draw(self) -> Blend:
        """Draw a blend with ``random``."""
        if not self.cutmix or (self.mixup and random.random() < 0.5):
            share = random.betavariate(self.mixup, self.mixup)
            return Blend(share, share)
        side = math.sqrt(1 - random.betavariate(self.cutmix, self.cutmix)) / 2
        row, column = random.randrange(self.height), random.randrange(self.width)
        rows, columns = int(side * self.height), int(side * self.width)
        top, bottom = max(0, row - rows), min(self.height, row + rows)
        left, right = max(0, column - columns), min(self.width, column + columns)
        return Blend(1 - (bottom - top) * (right - left) / (self.height * self.width), 1.0, top, left, bottom, right)


def mix(images: Tensor, labels: Tensor, blends: Blends, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix each sample with its partner: images, float (B, C, H, W), and labels, float32 (B, num_classes), that sum to 1."""
    partners, values = blends.pairs()
    share, opacity, top, left, bottom, right = values.unbind(1)
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    is_inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    own = torch.where(is_inside, 0, opacity[:, None, None, None]).to(images.dtype)
    hard, share = one_hot(labels, num_classes).float(), share[:, None]
    soft = share * hard + (1 - share) * hard[partners]
    return own * images + (1 - own) * images[partners], soft


class AugmentedSamples(Dataset[Any]):
    """The samples of ``dataset`` with transformed images and, if there is a ``mixing``, a random blend each.

    An image that the GPU will decode gets the seed of its transforms instead. A file that cannot be decoded is unchanged.
    """

    deterministic = False

    def __init__(self, dataset: Dataset[Any], transforms: Sequence[nn.Module], mixing: Mixing | None) -> None:
        self.dataset, self.transforms, self.mixing = dataset, transforms, mixing

    @property
    def read_seconds(self) -> float:
        """Seconds that ``dataset`` has spent so far on reading files."""
        seconds: float = getattr(self.dataset, "read_seconds", 0.0)
        return seconds

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if not isinstance(sample, tuple | list):
            return sample
        image, label = sample
        if isinstance(image, EncodedCrop):
            image = image._replace(seed=random.getrandbits(63))
        else:
            for transform in self.transforms:
                image = transform(image)
        return (image, label) if self.mixing is None else (image, label, self.mixing.draw())


def check_transforms(transforms: Sequence[nn.Module]) -> None:
    """Raise UsageError if a transform works on batches."""
    for transform in transforms:
        for kind, key in ((v2.MixUp, "mixup"), (v2.CutMix, "cutmix")):
            if isinstance(transform, kind):
                raise UsageError(
                    f"data.transforms: {kind.__name__} mixes the samples of a batch, and these transforms get one image; "
                    f"set --data.{key} {transform.alpha} instead."
                )
