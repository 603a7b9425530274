"""Make the strategy that a config selects."""

from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
from jsonargparse import Namespace

from lockstep.compat.nvml import may_have_gpus
from lockstep.data.loading import DataSharding
from lockstep.strategies.ddp import DDP, SingleDevice
from lockstep.strategies.deepspeed import DeepSpeed
from lockstep.strategies.deepspeed_ops import select_accelerator

AnyStrategy = SingleDevice | DDP | DeepSpeed


def preload(strategy: str) -> None:
    """Import the libraries of ``strategy`` before ranks are forked, so that they share the work.

    Do nothing if there are GPUs: DeepSpeed initializes CUDA, which forked ranks cannot use afterwards.
    """
    if strategy == "deepspeed" and not may_have_gpus():
        select_accelerator(torch.device("cpu"))
        # Every engine imports this module, which takes seconds because it compiles functions.
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")


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
