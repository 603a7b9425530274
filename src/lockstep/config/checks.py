"""Check values against each other, the file system and their ranges."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.config.deepspeed import deepspeed_config, missing_nvme_folder
from lockstep.config.schema import REFUSED_TRAINER_CLASSES, DeepSpeedOptions
from lockstep.core import WANDB_KEY_ADVICE, UsageError, is_secret, wandb_api_key


def check_ranges(config: Mapping[str, Any]) -> None:
    """Raise UsageError if a number is missing or out of range."""
    seed, best = config["seed_everything"], config["checkpoint"]["save_top_k"]
    if seed is None or seed is False or not 0 <= seed < 2**32:
        raise UsageError(f"seed_everything: {seed} must be 0 or more, and less than 2**32; or true, which draws a seed.")
    if best is None or best < 1:
        raise UsageError(f"checkpoint.save_top_k: {best} must be 1 or more.")
    for key in ("timeout_seconds", "min_mb_per_second"):
        if (value := config["checkpoint"][key]) is None or value <= 0:
            raise UsageError(f"checkpoint.{key}: {value} must be greater than 0.")
    for key, minimum in (("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
        value = config["trainer"].get(key)
        if isinstance(value, int | float) and value < minimum:
            raise UsageError(f"trainer.{key}: {value} must be {minimum} or more.")


def check_secrets(value: Any, key: str = "") -> None:
    """Raise UsageError if a text in a config looks like a secret: many files and W&B show the config."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_secrets(item, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            check_secrets(item, key)
    elif isinstance(value, str) and is_secret(key, value, certain=True):
        raise UsageError(
            f"{key}: the value looks like a secret, which config.yaml, launch.yaml and W&B would show; let your code read it "
            "from an environment variable, and export that in the shell that starts the run."
        )


def check_archive(archive: str | None, md5: str | None) -> None:
    """Raise UsageError if an archive of images comes from a remote machine without encryption and without a checksum."""
    if archive is not None and "://" in archive and not archive.startswith(("https://", "file://")) and not md5:
        raise UsageError(
            f"data.archive: {archive} can be replaced on its way, because its address is not encrypted; use https, or set "
            "data.archive_md5 to its checksum."
        )


_IMAGE_FILES = ("lockstep.data.ImageFolder", "lockstep.data.Shards")
"""DataModules that read files which are there already, unless they come in an archive."""


def check_mixing(mixup: float, cutmix: float, drop_last: bool) -> None:
    """Raise UsageError if samples cannot be mixed so."""
    for key, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if alpha < 0:
            raise UsageError(f"data.{key}: {alpha} must be 0, which mixes nothing, or greater.")
        if alpha and not drop_last:
            raise UsageError(
                f"data.{key}: {alpha} mixes pairs, and the last batch may end with half of one; set data.drop_last: true."
            )


def check_pairs(batch_size: int, ranks: int) -> None:
    """Raise UsageError if a rank would have a part of a pair that is mixed."""
    if share := batch_size // ranks % 2:
        raise UsageError(
            f"data.batch_size: {batch_size} gives each of {ranks} ranks an odd number of samples, but mixup and cutmix need "
            f"pairs; use {batch_size + share * ranks}."
        )


def check_data(data: Mapping[str, Any] | None) -> None:
    """Raise UsageError if the data cannot be loaded safely; ``data`` is a class and its arguments."""
    path, arguments = ("", {}) if data is None else (str(data.get("class_path")), data.get("init_args", {}))
    if path.startswith("lockstep.data."):
        check_mixing(arguments.get("mixup") or 0, arguments.get("cutmix") or 0, arguments.get("drop_last", True))
    if path in _IMAGE_FILES:
        check_archive(arguments.get("archive"), arguments.get("archive_md5"))


def check_start(
    command: str,
    config: Mapping[str, Any],
    world_sizes: Iterable[int],
    env: Mapping[str, str],
    sweep: Mapping[str, Sequence[str]] | None = None,
    sees_data: bool = True,
    has_checkpoint: bool = False,
) -> None:
    """Check what each way to start a run can know before it starts anything or makes a folder.

    Args:
        config: The validated config.
        world_sizes: Each number of ranks that the run may have.
        env: Environment of the ranks.
        sweep: Keys and the values that they take in turn.
        sees_data: Whether this machine has the files that the ranks read.
        has_checkpoint: Whether another job leaves the checkpoint before the ranks start.

    Raises:
        UsageError: The ranks would refuse the config.
    """
    if not has_checkpoint:
        check_checkpoint_path(command, config["ckpt_path"], sweep or {})
    check_batch_size(config["data"], world_sizes if command == "fit" else ())  # the ranks may share others unevenly
    if sees_data and config["shared_filesystem"]:
        for root in (sweep or {}).get("data.root", [None]):
            check_data_root(config["data"], root)
    check_deepspeed(config)
    check_wandb_key(config, env)


def check_batch_size(data: Any, world_sizes: Iterable[int]) -> None:
    """Raise UsageError if the global batch of a shared DataModule cannot be divided by a number of ranks."""
    size = data.get("init_args", {}).get("batch_size") if isinstance(data, Mapping) else None
    if not str(data and data.get("class_path")).startswith("lockstep.data.") or not isinstance(size, int):
        return
    if size < 1:
        raise UsageError(f"data.batch_size: {size} must be 1 or more.")
    for ranks in world_sizes:
        if below := size % ranks:
            near = " or ".join(str(number) for number in (size - below, size - below + ranks) if number)
            raise UsageError(f"data.batch_size: the global batch size {size} is not divisible by {ranks} ranks; use {near}.")
        if data["init_args"].get("mixup") or data["init_args"].get("cutmix"):
            check_pairs(size, ranks)


def check_data_root(data: Any, root: str | None = None) -> None:
    """Raise UsageError if the folder of a shared DataModule, or another ``root``, neither exists nor can be made."""
    arguments = data.get("init_args", {}) if isinstance(data, Mapping) else {}
    root = arguments.get("root") if root is None else root
    path = str(data and data.get("class_path"))
    if not path.startswith("lockstep.data.") or not isinstance(root, str | Path):
        return
    if os.path.isdir(root):
        if path == "lockstep.data.Shards":
            _check_shards(Path(root), [str(arguments.get(split) or split) for split in ("train", "val", "test")])
        return
    elsewhere = "if only the nodes have it, set --shared_filesystem false"
    if path in _IMAGE_FILES and not arguments.get("archive"):
        raise UsageError(f"data.root: {root} is not a folder here; give the one with train/ and val/, or, {elsewhere}.")
    existing = next(folder for folder in Path(root).absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"data.root: {root} does not exist, and {existing} cannot be written to make it; {elsewhere}.")


def _check_shards(root: Path, splits: Sequence[str]) -> None:
    """Raise UsageError if no split has a shard, or one is not packed to its end."""
    if not any(any((root / split).glob("*.tar*")) for split in splits):
        raise UsageError(
            f"data.root: {root} has no .tar file in {', '.join(f'{split}/' for split in splits)}; lockstep pack makes them of "
            "folders of images, which lockstep.data.ImageFolder reads as they are."
        )
    for split in splits:
        if (root / split / ".pack").exists():
            raise UsageError(f"data.root: {root / split} is not packed to its end; run lockstep pack again, as before.")


def check_trainer_classes(trainer: Mapping[str, Any]) -> None:
    """Raise UsageError if ``trainer`` names a callback or logger that a run cannot have."""
    for key in ("callbacks", "logger"):
        given = trainer.get(key)
        for value in given if isinstance(given, list | tuple) else [given]:
            path = str(value.get("class_path") if isinstance(value, Mapping) else value)
            name = path.rpartition(".")[2]
            if name in REFUSED_TRAINER_CLASSES and (path == name or path.startswith("lightning.pytorch.")):
                raise UsageError(f"trainer.{key}: {name} {REFUSED_TRAINER_CLASSES[name]}.")


def check_wandb_key(config: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Raise UsageError if W&B is to be online and ``env`` has no key, for which W&B would ask in the run."""
    mode = env.get("WANDB_MODE") if (given := config["wandb"]["mode"]) == "auto" else given
    if mode == "online" and wandb_api_key(env) is None:
        raise UsageError(f"wandb.mode: online needs an API key, and none is found; {WANDB_KEY_ADVICE}, or set offline.")


def check_characters(root: Path, here: Path) -> None:
    """Raise UsageError if a path has a character that Slurm or Python interprets."""
    for what, path in (("run.root", root), ("The folder of submission", here)):
        if bad := re.search(r"[%\\\n:]", str(path)):
            raise UsageError(f"{what}: {str(path)!r} contains {bad[0]!r}, which Slurm or Python interprets; rename it.")


def check_run_root(root: Path, name: str) -> None:
    """Raise UsageError if the run folder cannot be written."""
    existing = next(folder for folder in (root / name, *(root / name).parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"run.root: {existing} cannot be written; choose another folder with --run.root.")


def check_checkpoint_path(command: str, path: str | None, sweep: Mapping[str, Sequence[str]]) -> None:
    """Raise UsageError if a checkpoint does not exist, or is not set although ``command`` needs one."""
    paths = sweep.get("ckpt_path", [] if path is None else [path])
    for given in paths:
        if not Path(given).exists():
            raise UsageError(f"ckpt_path: {given} does not exist; give a checkpoint or a run folder.")
    if command != "fit" and not paths:
        raise UsageError(f"ckpt_path: must be set to {command}: a checkpoint, or a run folder; --ckpt_path runs/NAME/ID.")


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raise UsageError if DeepSpeed options contradict each other or DeepSpeed's JSON, or DeepSpeed cannot do them."""
    if config["strategy"] == "deepspeed":
        if config["trainer"].get("gradient_clip_algorithm") == "value":
            raise UsageError("trainer.gradient_clip_algorithm: 'value' is not for ZeRO, which clips by norm; use strategy ddp.")
        if config["distributed"]["backend"] == "gloo" and config["trainer"].get("accelerator") in ("gpu", "cuda"):
            raise UsageError("distributed.backend: 'gloo' on GPUs is not for ZeRO, which needs nccl there; use strategy ddp.")
        options = config["deepspeed"]
        paths = {name: Path(options[name]) for name in ("config", "nvme_path") if options[name]}
        deepspeed_config(DeepSpeedOptions(**{**options, **paths}))


def check_nvme_path(config: Mapping[str, Any]) -> None:
    """Raise UsageError if the NVMe folder does not exist on this machine; call it where the ranks will run."""
    path = config["deepspeed"]["nvme_path"] if config["strategy"] == "deepspeed" else None
    if path and not Path(path).is_dir():
        raise UsageError(missing_nvme_folder(Path(path)))
