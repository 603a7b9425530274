"""What ``step.py`` trains: networks, and images in memory or on the device."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lockstep.core import World
from lockstep.data.synthetic import SyntheticImages
from lockstep.distributed import local_devices
from lockstep.models.networks import MLP, ConvNet, make_torchvision_model

IMAGE_SHAPE = (1, 28, 28)
NETWORKS: dict[str, tuple[type[nn.Module] | str, dict[str, Any]]] = {
    "tiny MLP": (MLP, {"shape": IMAGE_SHAPE, "hidden": [64], "num_classes": 10}),
    "small conv net": (ConvNet, {"in_channels": 1, "num_classes": 10, "widths": [16, 32]}),
    "ResNet-50": ("resnet50", {}),
    "ViT-B/16": ("vit_b_16", {}),
}
"""Networks by the name in the table: a class and its arguments, or the name of one of torchvision's for ImageNet."""


@dataclass(frozen=True)
class Setup:
    """What is trained.

    Attributes:
        network: One of ``NETWORKS``.
        batch_size: Samples per step on each rank.
        precision: As in Lightning's Trainer.
        accelerator: As in ``trainer.accelerator``.
    """

    network: str
    batch_size: int = 64
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    channels_last: bool = False
    compile: bool = False
    accelerator: str = "auto"

    @property
    def is_imagenet(self) -> bool:
        """Whether the images have ImageNet's size, and are on the device."""
        return isinstance(NETWORKS[self.network][0], str)

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and filters."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def make_network(self) -> nn.Module:
        """The network, in its memory format, and compiled if it is to be."""
        kind, arguments = NETWORKS[self.network]
        network = make_torchvision_model(kind, 1000, arguments) if isinstance(kind, str) else kind(**arguments)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.compile:
            network.compile()
        return network

    def make_data(self, world: World, steps: int, device: torch.device) -> "Dataset[Any]":
        """Random images for ``steps`` steps of all ranks."""
        samples = steps * self.batch_size * world.size
        if self.is_imagenet:
            return DeviceImages(samples, self.batch_size, device, self.memory_format)
        return SyntheticImages(samples, IMAGE_SHAPE, 10, seed=0)

    def device(self, world: World) -> torch.device:
        """The device of this rank."""
        return local_devices(world, self.accelerator, "auto", os.environ)[world.local_rank]


class DeviceImages(Dataset[Any]):
    """Any number of samples, as views of one batch of random normalized images (3, 224, 224) on ``device``."""

    deterministic = True

    def __init__(self, samples: int, batch_size: int, device: torch.device, memory_format: torch.memory_format) -> None:
        self.samples = samples
        self.images = torch.randn(batch_size, 3, 224, 224, device=device).to(memory_format=memory_format)
        self.labels = torch.randint(0, 1000, (batch_size,), device=device)

    def __len__(self) -> int:
        return self.samples

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch: images, float32 (B, 3, 224, 224), and labels, int64 (B,)."""
        return self.images[: len(indices)], self.labels[: len(indices)]


class DeviceData(LightningDataModule):
    """``DeviceImages`` for lockstep; the arguments are those of the dataset."""

    def __init__(self, samples: int, batch_size: int, channels_last: bool) -> None:
        super().__init__()
        self.samples, self.batch_size = samples, batch_size
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def train_dataloader(self) -> DataLoader[Any]:
        """Global batches."""
        assert self.trainer is not None
        size = self.batch_size // self.trainer.world_size
        data = DeviceImages(self.samples, size, self.trainer.strategy.root_device, self.memory_format)
        return DataLoader(data, self.batch_size, collate_fn=as_it_is)


def as_it_is(batch: Any) -> Any:
    """Collate nothing: the dataset returns batches."""
    return batch


as_it_is.deterministic = True  # type: ignore[attr-defined]  # it draws no random numbers


def normalize(images: Tensor) -> Tensor:
    """Convert uint8 images (B, C, H, W) to floats around zero; floats are normalized already."""
    return images if images.is_floating_point() else images.to(torch.float32).sub_(127.5).mul_(1 / 73.95)
