"""What cannot be, though every key is right: a checkpoint that is not there, a folder, a batch or resources that do not fit.

No torch here: the launcher uses this room.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.errors import UsageError
from lockstep.flags import Nodes
from lockstep.options import DeepSpeedOptions
from lockstep.profile import Profile
from lockstep.zero_config import deepspeed_config, no_disk


def refuse_folders(root: Path, name: str, here: Path) -> None:
    """Raise UsageError about a run folder that cannot be written, or a path that Slurm or Python would not understand."""
    for what, path in (("run.root", root), ("The folder of submission", here)):
        if bad := re.search(r"[%\\\n:]", str(path)):
            raise UsageError(f"{what}: {str(path)!r} has {bad[0]!r} in it, which Slurm or Python take for something else.")
    there = next(folder for folder in (root / name, *(root / name).parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"run.root: {there} cannot be written; choose another with --run.root.")


def refuse_missing_checkpoint(command: str, path: str | None, sweep: Mapping[str, Sequence[str]]) -> None:
    """Raise UsageError about a checkpoint that is not there, or not given."""
    for place in sweep.get("ckpt_path", [] if path is None else [path]):
        if not Path(place).exists():
            raise UsageError(f"ckpt_path: there is no {place}; give a checkpoint, or a run folder.")
    if command != "fit" and path is None and "ckpt_path" not in sweep:
        raise UsageError(f"ckpt_path: must be set to {command}: a checkpoint, or a run folder.")


def refuse_contradictions(config: Mapping[str, Any]) -> None:
    """Raise UsageError about options of DeepSpeed that contradict each other, its own JSON, or what it does not do."""
    if config["strategy"] == "deepspeed":
        if config["trainer"].get("gradient_clip_algorithm") == "value":
            raise UsageError("trainer.gradient_clip_algorithm: 'value' is not for ZeRO, which clips by norm; use strategy ddp.")
        given = config["deepspeed"]
        paths = {name: Path(given[name]) for name in ("config", "nvme_path") if given[name]}
        deepspeed_config(DeepSpeedOptions(**{**given, **paths}))


def refuse_missing_disk(config: Mapping[str, Any]) -> None:
    """Raise UsageError about a folder for offloading that is not on this machine, where the ranks will be."""
    path = config["deepspeed"]["nvme_path"] if config["strategy"] == "deepspeed" else None
    if path and not Path(path).is_dir():
        raise UsageError(no_disk(Path(path)))


def refuse_misfits(config: Mapping[str, Any], profile: Profile, nodes: Nodes) -> None:
    """Raise about what does not go together with the resources."""
    accelerator = config["trainer"].get("accelerator")
    if (
        accelerator in ("gpu", "cuda")
        and not profile.gpus_per_node
        and not any("gpu" in argument for argument in profile.sbatch)
    ):
        raise UsageError(f"trainer.accelerator: {accelerator!r} needs GPUs; ask for some with --gpus-per-node.")
    data = config["data"]
    size = data.get("init_args", {}).get("batch_size") if isinstance(data, Mapping) else None
    if str(data and data.get("class_path")).startswith("lockstep.data.") and isinstance(size, int):
        if size < 1:
            raise UsageError(f"data.batch_size: {size} must be 1 or more.")
        for ranks in (number * profile.ranks for number in range(nodes.least, nodes.most + 1)):
            if size % ranks:
                raise UsageError(f"data.batch_size: {size} is the global batch and does not divide by {ranks} ranks.")
