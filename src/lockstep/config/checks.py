"""What cannot be, though every key is right: a checkpoint that is not there, a folder, a batch or resources that do not fit.

No torch here: the launcher uses this room.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.config.deepspeed import deepspeed_config, missing_nvme_folder
from lockstep.config.schema import DeepSpeedOptions
from lockstep.core import UsageError


def check_run_root(root: Path, name: str, here: Path) -> None:
    """Raise UsageError about a run folder that cannot be written, or a path that Slurm or Python would not understand."""
    for what, path in (("run.root", root), ("The folder of submission", here)):
        if bad := re.search(r"[%\\\n:]", str(path)):
            raise UsageError(f"{what}: {str(path)!r} has {bad[0]!r} in it, which Slurm or Python take for something else.")
    there = next(folder for folder in (root / name, *(root / name).parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"run.root: {there} cannot be written; choose another with --run.root.")


def check_checkpoint_path(command: str, path: str | None, sweep: Mapping[str, Sequence[str]]) -> None:
    """Raise UsageError about a checkpoint that is not there, or not given."""
    for place in sweep.get("ckpt_path", [] if path is None else [path]):
        if not Path(place).exists():
            raise UsageError(f"ckpt_path: there is no {place}; give a checkpoint, or a run folder.")
    if command != "fit" and path is None and "ckpt_path" not in sweep:
        raise UsageError(f"ckpt_path: must be set to {command}: a checkpoint, or a run folder.")


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raise UsageError about options of DeepSpeed that contradict each other, its own JSON, or what it does not do."""
    if config["strategy"] == "deepspeed":
        if config["trainer"].get("gradient_clip_algorithm") == "value":
            raise UsageError("trainer.gradient_clip_algorithm: 'value' is not for ZeRO, which clips by norm; use strategy ddp.")
        given = config["deepspeed"]
        paths = {name: Path(given[name]) for name in ("config", "nvme_path") if given[name]}
        deepspeed_config(DeepSpeedOptions(**{**given, **paths}))


def check_nvme_path(config: Mapping[str, Any]) -> None:
    """Raise UsageError about a folder for offloading that is not on this machine, where the ranks will be."""
    path = config["deepspeed"]["nvme_path"] if config["strategy"] == "deepspeed" else None
    if path and not Path(path).is_dir():
        raise UsageError(missing_nvme_folder(Path(path)))
