"""The strategy that a config names."""

from datetime import timedelta
from pathlib import Path

import torch
from jsonargparse import Namespace

from lockstep.ddp import DDP, SingleDevice
from lockstep.order import Sharding
from lockstep.zero import DeepSpeed

AnyStrategy = SingleDevice | DDP | DeepSpeed


def make_strategy(
    config: Namespace, devices: list[torch.device], sharding: Sharding, folder: Path | None = None
) -> AnyStrategy:
    """The strategy of a config, for this rank.

    A world of one needs no DDP: it trains on its one device. ZeRO is of use to it too, for what is offloaded: ``folder`` is
    this rank's on NVMe, if anything goes there.
    """
    if config.strategy == "deepspeed":
        return DeepSpeed(devices, sharding, config.deepspeed, timedelta(minutes=config.ddp.timeout_minutes), folder)
    return SingleDevice(devices[0], sharding) if sharding.world.size == 1 else DDP(devices, sharding, config.ddp)
