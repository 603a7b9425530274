"""Check values against each other, the file system and their ranges."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.config.deepspeed import deepspeed_config, missing_nvme_folder
from lockstep.config.schema import REFUSED_TRAINER_CLASSES, DeepSpeedOptions
from lockstep.core import WANDB_KEY_ADVICE, UsageError, did_you_mean, is_secret, wandb_api_key


def check_ranges(config: Mapping[str, Any]) -> None:
    """Raise UsageError if a number is missing or out of range."""
    seed, best = config["seed_everything"], config["checkpoint"]["save_top_k"]
    if seed is None or seed is False or not 0 <= seed < 2**32:
        raise UsageError(f"seed_everything: {seed} must be 0 or more, and less than 2**32; or true, which draws a seed.")
    if best is None or best < 1:
        raise UsageError(f"checkpoint.save_top_k: {best} must be 1 or more.")
    for key in _POSITIVE:
        if (value := _value(config, key)) is None or not value > 0:  # NaN too
            raise UsageError(f"{key}: {value} must be greater than 0.")
    for key, minimum in _MINIMA.items():
        value = _value(config, key)
        if isinstance(value, int | float) and not value >= minimum:
            meaning = f", or {minimum}, which sets no limit" if minimum < 0 else ""
            raise UsageError(f"{key}: {value} must be {max(minimum, 0)} or more{meaning}.")
    _check_trainer_values(config["trainer"])


_POSITIVE = (
    *("checkpoint.timeout_seconds", "checkpoint.min_mb_per_second"),
    *("run.hang_timeout_seconds", "distributed.timeout_minutes", "ddp.bucket_cap_mb"),
)

_MINIMA = {
    **{f"trainer.{key}": -1 for key in ("max_epochs", "max_steps", "num_sanity_val_steps")},
    **{f"trainer.{key}": 0 for key in ("gradient_clip_val", "log_every_n_steps", "fast_dev_run")},
    **{f"trainer.{key}": 0 for key in ("overfit_batches", "reload_dataloaders_every_n_epochs")},
    **{f"trainer.{key}": 1 for key in ("accumulate_grad_batches", "check_val_every_n_epoch")},
    **{"checkpoint.every_n_steps": 1, "checkpoint.every_n_minutes": 0, "checkpoint.keep_last": 1, "run.max_restarts": 0},
}
"""Keys whose numbers have a minimum; -1 is for no limit."""

_SHARES = ("train_batches", "val_batches", "test_batches", "predict_batches")


def _value(config: Mapping[str, Any], key: str) -> Any:
    group, _, name = key.partition(".")
    return config[group].get(name)


def _check_trainer_values(trainer: Mapping[str, Any]) -> None:
    """Raise UsageError for a value that Lightning's Trainer refuses at its construction, or divides by."""
    for key in ("overfit_batches", "val_check_interval", *(f"limit_{share}" for share in _SHARES)):
        value = trainer.get(key)
        if isinstance(value, int | float) and not (0 <= value <= 1 or (value > 1 and value % 1 == 0)):
            raise UsageError(f"trainer.{key}: {value} must be a fraction from 0.0 to 1.0, or a whole number of batches.")
    interval = trainer.get("val_check_interval")
    if interval == 0 and isinstance(interval, int):
        raise UsageError("trainer.val_check_interval: 0 must be 1 or more; without validation: --trainer.limit_val_batches 0.")
    if isinstance(interval, float) and trainer.get("check_val_every_n_epoch", 1) is None:
        raise UsageError(
            f"trainer.val_check_interval: {interval} is a fraction of an epoch, but check_val_every_n_epoch: null counts "
            "batches over all epochs; give a whole number of batches."
        )
    for key in ("val_check_interval", "max_time"):
        if isinstance(text := trainer.get(key), str) and not re.fullmatch(r"\s*\d+:\d+:\d+:\d+\s*", text):
            raise UsageError(f"trainer.{key}: {text!r} is not a time; write days, hours, minutes and seconds: 00:12:00:00.")
    for key, valid in _WORDS.items():
        word = trainer.get(key)
        if isinstance(word, str) and word.isidentifier() and word.lower() == word and word not in valid:
            raise UsageError(f"trainer.{key}: {word!r} is not valid{did_you_mean(word, valid)}")


_WORDS = {
    "accelerator": ("auto", "cpu", "gpu", "cuda"),
    "gradient_clip_algorithm": ("norm", "value"),
    "profiler": ("simple", "advanced", "pytorch", "xla"),
}
"""Words that keys of Lightning's Trainer accept. Classes, which they accept too, have a dot or a capital letter."""


def check_secrets(value: Any, key: str = "") -> None:
    """Raise UsageError if a string in a config looks like a secret: files and W&B show the config."""
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
            f"data.archive: {archive} is not encrypted, so that it can be altered in transit; use https, or set "
            "data.archive_md5 to its checksum."
        )


def check_export_format(out: Path) -> None:
    """Raise UsageError if ``out`` has the name of a file that torch.load reads."""
    if out.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise UsageError(f"--out: {out}: an export is in the safetensors format; name it {out.stem}.safetensors.")


_IMAGE_FILES = ("lockstep.data.ImageFolder", "lockstep.data.Shards")
"""DataModules that read existing files, unless they get an archive."""


def check_mixing(mixup: float, cutmix: float, drop_last: bool) -> None:
    """Raise UsageError if mixup or cutmix is negative, or the last batch may be incomplete."""
    for key, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if alpha < 0:
            raise UsageError(f"data.{key}: {alpha} must be 0 (off) or greater.")
        if alpha and not drop_last:
            raise UsageError(
                f"data.{key}: {alpha} mixes pairs, but the last batch may have an odd size; set data.drop_last: true."
            )


def check_pairs(batch_size: int, ranks: int) -> None:
    """Raise UsageError if mixup or cutmix would get an odd number of samples on a rank."""
    if share := batch_size // ranks % 2:
        raise UsageError(
            f"data.batch_size: {batch_size} gives each of {ranks} ranks an odd number of samples, but mixup and cutmix need "
            f"pairs; use {batch_size + share * ranks}."
        )


def check_data(data: Mapping[str, Any] | None) -> None:
    """Raise UsageError if the data cannot be loaded safely; ``data`` is a class and its arguments."""
    path, arguments = ("", {}) if data is None else (str(data.get("class_path")), data.get("init_args", {}))
    if path.startswith("lockstep.data."):
        for key, least in (("batch_size", 1), ("batch_size_per_rank", 1), ("num_workers", 0)):
            if isinstance(value := arguments.get(key), int) and value < least:
                raise UsageError(f"data.{key}: {value} must be {least} or more.")
        check_mixing(arguments.get("mixup") or 0, arguments.get("cutmix") or 0, arguments.get("drop_last", True))
    if path in _IMAGE_FILES:
        check_archive(arguments.get("archive"), arguments.get("archive_md5"))


def check_start(
    command: str,
    config: Mapping[str, Any],
    world_sizes: Iterable[int],
    env: Mapping[str, str],
    sees_data: bool = True,
    has_checkpoint: bool = False,
) -> None:
    """Make the checks that every launcher makes before it starts a rank or creates a folder.

    Args:
        config: The validated config.
        world_sizes: Each number of ranks that the run may have.
        env: Environment of the ranks.
        sees_data: Whether this machine has the files that the ranks read.
        has_checkpoint: Whether an earlier job writes the checkpoint before the ranks start.

    Raises:
        UsageError: The ranks would refuse the config.
    """
    if not has_checkpoint:
        check_checkpoint_path(command, config["ckpt_path"])
    check_batch_size(config["data"], world_sizes if command == "fit" else ())  # the ranks may share others unevenly
    if sees_data and config["shared_filesystem"]:
        check_data_root(config["data"])
    check_deepspeed(config)
    check_wandb_key(config, env)


_RANKS_PER_CPU = 8
"""Limit of ranks per CPU. In a test, a few may share one; more take minutes to start and hardly train."""


def check_ranks(nodes: int, ranks: int, cpus: int) -> None:
    """Raise UsageError if ``cpus`` CPUs are far too few for ``nodes`` × ``ranks`` processes."""
    if nodes * ranks > _RANKS_PER_CPU * cpus:
        flag, count = ("--ranks", ranks) if ranks > 1 else ("--nodes", nodes)
        each = f" on each of {nodes} nodes" if ranks > 1 and nodes > 1 else ""
        raise UsageError(
            f"{flag}: {count}{each} would be {nodes * ranks} processes on the {cpus} CPUs of this machine, which are too few; "
            f"use at most {_RANKS_PER_CPU * cpus} ranks in all."
        )


def check_batch_size(data: Any, world_sizes: Iterable[int]) -> None:
    """Raise UsageError if the global batch of a shared DataModule cannot be divided by a number of ranks."""
    size = data.get("init_args", {}).get("batch_size") if isinstance(data, Mapping) else None
    if not str(data and data.get("class_path")).startswith("lockstep.data.") or not isinstance(size, int):
        return
    for ranks in world_sizes:
        if below := size % ranks:
            near = " or ".join(str(number) for number in (size - below, size - below + ranks) if number)
            raise UsageError(f"data.batch_size: the global batch size {size} is not divisible by {ranks} ranks; use {near}.")
        if data["init_args"].get("mixup") or data["init_args"].get("cutmix"):
            check_pairs(size, ranks)


def check_data_root(data: Any) -> None:
    """Raise UsageError if the folder of a shared DataModule neither exists nor can be created."""
    arguments = data.get("init_args", {}) if isinstance(data, Mapping) else {}
    path, root = str(data and data.get("class_path")), arguments.get("root")
    if not path.startswith("lockstep.data.") or not isinstance(root, str | Path):
        return
    if os.path.isdir(root):  # unlike Path.is_dir, it is false where a folder above cannot be searched
        if not os.access(root, os.R_OK | os.X_OK):
            raise UsageError(f"data.root: {root} cannot be read; its permissions do not allow it.")
        if path == "lockstep.data.Shards":
            _check_shards(Path(root), [str(arguments.get(split) or split) for split in ("train", "val", "test")])
        return
    elsewhere = "if only the nodes have it, set --shared_filesystem false"
    if path in _IMAGE_FILES and not arguments.get("archive"):
        raise UsageError(f"data.root: {root} is not a folder here; give the one with train/ and val/, or, {elsewhere}.")
    existing = next(folder for folder in Path(root).absolute().parents if os.path.exists(folder))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"data.root: {root} does not exist, and {existing} cannot be written to make it; {elsewhere}.")


def _check_shards(root: Path, splits: Sequence[str]) -> None:
    """Raise UsageError if no split has a shard, or a split is only partly packed."""
    if not any(any((root / split).glob("*.tar*")) for split in splits):
        raise UsageError(
            f"data.root: {root} has no .tar file in {', '.join(f'{split}/' for split in splits)}; lockstep pack makes them "
            "from folders of images; to read the folders themselves, use lockstep.data.ImageFolder."
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
    """Raise UsageError if W&B is online and ``env`` has no API key: W&B would ask for it in the run."""
    mode = env.get("WANDB_MODE") if (given := config["wandb"]["mode"]) == "auto" else given
    if mode == "online" and wandb_api_key(env) is None:
        raise UsageError(f"wandb.mode: online needs an API key, but none is found; {WANDB_KEY_ADVICE}, or set offline.")


def check_characters(root: Path, here: Path) -> None:
    """Raise UsageError if a path has a character that Slurm or Python interprets."""
    for what, path in (("run.root", root), ("The folder of submission", here)):
        if bad := re.search(r"[%\\\n:]", str(path)):
            raise UsageError(f"{what}: {str(path)!r} contains {bad[0]!r}, which Slurm or Python interprets; rename it.")


def check_run_root(root: Path, name: str) -> None:
    """Raise UsageError if the run folder cannot be written."""
    existing = next(folder for folder in (root / name, *(root / name).parents) if os.path.exists(folder))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"run.root: {existing} cannot be written; choose another folder with --run.root.")


def check_checkpoint_path(command: str, path: str | None) -> None:
    """Raise UsageError if a checkpoint does not exist, or is not set although ``command`` needs one."""
    if path is not None and not os.path.exists(path):
        raise UsageError(f"ckpt_path: {path} does not exist; give a checkpoint or a run folder.")
    if command != "fit" and path is None:
        raise UsageError(f"ckpt_path: must be set to {command}: a checkpoint, or a run folder; --ckpt_path runs/NAME/ID.")


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raise UsageError if DeepSpeed options contradict each other or DeepSpeed's JSON, or DeepSpeed does not support them."""
    if config["strategy"] == "deepspeed":
        if config["trainer"].get("gradient_clip_algorithm") == "value":
            raise UsageError("trainer.gradient_clip_algorithm: 'value' is not supported: ZeRO clips by norm; use strategy ddp.")
        if config["distributed"]["backend"] == "gloo" and config["trainer"].get("accelerator") in ("gpu", "cuda"):
            raise UsageError("distributed.backend: 'gloo' on GPUs is not supported: ZeRO needs nccl there; use strategy ddp.")
        options = config["deepspeed"]
        paths = {name: Path(options[name]) for name in ("config", "nvme_path") if options[name]}
        deepspeed_config(DeepSpeedOptions(**{**options, **paths}))


def check_nvme_path(config: Mapping[str, Any]) -> None:
    """Raise UsageError if the NVMe folder does not exist on this machine; call it where the ranks will run."""
    path = config["deepspeed"]["nvme_path"] if config["strategy"] == "deepspeed" else None
    if path and not Path(path).is_dir():
        raise UsageError(missing_nvme_folder(Path(path)))
