"""The strategy that a config names."""

from datetime import timedelta
from pathlib import Path

import torch
from jsonargparse import Namespace

from lockstep.data import DataSharding
from lockstep.strategies.ddp import DDP, SingleDevice
from lockstep.strategies.deepspeed import DeepSpeed

AnyStrategy = SingleDevice | DDP | DeepSpeed


def make_strategy(
    config: Namespace, devices: list[torch.device], sharding: DataSharding, folder: Path | None = None
) -> AnyStrategy:
    """The strategy of a config, for this rank.

    A world of one needs no DDP: it trains on its one device. ZeRO is of use to it too, for what is offloaded: ``folder`` is
    this rank's on NVMe, if anything goes there.
    """
    timeout = timedelta(minutes=config.distributed.timeout_minutes)
    if config.strategy == "deepspeed":
        return DeepSpeed(devices, sharding, config.deepspeed, timeout, folder)
    if sharding.world.size == 1:
        return SingleDevice(devices[0], sharding)
    return DDP(devices, sharding, config.ddp, timeout)
