"""Prepare a node once before its ranks start: import what they share, and start to copy the data."""

import os
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import torch
from jsonargparse import Namespace

from lockstep import strategies
from lockstep.compat.lightning import find_plugins_once
from lockstep.compat.nvml import may_have_gpus
from lockstep.core import World
from lockstep.data import STAGE_SPLITS, Shards
from lockstep.data.packed import start_copying


def preload(config: Namespace, has_rank_zero: bool = True) -> None:
    """Import the libraries that a config uses. Those of W&B take a second, and only rank zero needs them."""
    if not may_have_gpus() and not torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no rank looks for NVIDIA's libraries again
    strategies.preload(config.strategy)
    find_plugins_once()
    if has_rank_zero:
        for name in ("wandb", "requests"):  # also if W&B is disabled: the logger then has a run that does nothing
            import_module(name)


def copy_shards(command: str, config: Namespace, world: World) -> None:
    """Start to copy the shards that ``command`` reads to ``data.copy_to``, a disk of this node, if set; once per node."""
    data = config.get("data")
    if world.local_rank or not data or not issubclass(resolve_name(data.class_path), Shards):
        return
    given = data.init_args
    if given.get("copy_to") is not None:
        splits = [*STAGE_SPLITS[command], *(("test",) if command == "fit" and config.run.test_after_fit else ())]
        folders = [Path(given.root) / given[split] for split in splits]
        start_copying(folders, Path(given.copy_to), world.node_rank, world.nodes)
