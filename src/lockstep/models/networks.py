"""Two small networks for the small data sets, and torchvision models by name."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lockstep.core import UsageError, did_you_mean


class MLP(nn.Sequential):
    """Fully connected layers with ReLU and dropout between them.

    Args:
        shape: Shape of one input, channels first: (C, H, W).
        num_classes: Number of outputs.
        hidden: Width of each hidden layer.
        dropout: Dropout probability of each hidden layer.
    """

    def __init__(
        self, shape: Sequence[int] = (1, 8, 8), num_classes: int = 10, hidden: Sequence[int] = (64,), dropout: float = 0.0
    ) -> None:
        widths = [math.prod(shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class ConvNet(nn.Module):
    """Blocks of two 3×3 convolutions with group norm and SiLU; each block halves the resolution, then the mean is taken.

    Computes the same on any number of ranks: group norm, unlike batch norm, does not depend on the samples per rank.
    SiLU is smooth: at the kink of ReLU, rounding that depends on the number of ranks could switch a gradient on or off.

    Args:
        in_channels: Channels of the input (B, C, H, W); any size.
        num_classes: Number of outputs.
        widths: Channels of each block, multiples of 8.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, widths: Sequence[int] = (32, 64)) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise([in_channels, *widths]):
            blocks += [self._unit(fan_in, fan_out, stride=2 if blocks else 1), self._unit(fan_out, fan_out, stride=1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], num_classes)

    @staticmethod
    def _unit(fan_in: int, fan_out: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False), nn.GroupNorm(8, fan_out), nn.SiLU())

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, C, H, W)."""
        output: Tensor = self.head(self.blocks(images).mean(dim=(2, 3)))
        return output


def make_torchvision_model(name: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Create the torchvision classification model ``name`` with ``num_classes`` outputs.

    Raises:
        UsageError: The model is unknown, does not take one of the arguments, or its weights cannot be downloaded.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if "." in name:
        raise UsageError(
            f"model.network: {name!r} is neither the import path of an nn.Module nor the name of a torchvision model."
        )
    if name not in names:
        raise UsageError(f"model.network: torchvision has no classification model {name!r}{did_you_mean(name, names)}")
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads return a tuple in training.
        arguments = {"aux_logits": False, "init_weights": True, **arguments}
    try:
        model: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.network_args: torchvision's {name} raised: {error}.") from None
    except OSError as error:  # URLError too
        weights = arguments.get("weights")
        raise UsageError(
            f"model.network_args.weights: {weights!r} of {name} cannot be downloaded ({error}); where there is internet, run: "
            f'python -c "import torchvision; torchvision.models.get_model({name!r}, weights={weights!r})", which keeps them in '
            f"{torch.hub.get_dir()}."
        ) from None
    return model
