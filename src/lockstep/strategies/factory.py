"""Make the strategy that a config selects."""

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
    """Make this rank's strategy; a single rank needs no DDP, but may use ZeRO for its offload."""
    timeout = timedelta(minutes=config.distributed.timeout_minutes)
    if config.strategy == "deepspeed":
        return DeepSpeed(devices, sharding, config.deepspeed, timeout, folder)
    if sharding.world.size == 1:
        return SingleDevice(devices[0], sharding)
    return DDP(devices, sharding, config.ddp, timeout)
