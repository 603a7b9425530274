"""Import what ranks need before they are forked, so that none of them, in no attempt, has to."""

import os
from importlib import import_module

import torch
from jsonargparse import Namespace

from lockstep import strategies
from lockstep.compat.lightning import find_plugins_once
from lockstep.compat.nvml import may_have_gpus


def preload(config: Namespace, has_rank_zero: bool = True) -> None:
    """Import the libraries that a config uses; W&B's, which take a second, only where rank zero is forked."""
    if not may_have_gpus() and not torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no rank looks for NVIDIA's libraries again
    strategies.preload(config.strategy)
    find_plugins_once()
    if has_rank_zero:
        for name in ("wandb", "requests"):  # also if W&B is disabled: its run that does nothing is the Trainer's
            import_module(name)
