"""Build DeepSpeed's JSON config from the options of a run."""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.compat import check_tested_version
from lockstep.config.messages import expected_mapping
from lockstep.config.schema import DeepSpeedOptions
from lockstep.core import UsageError, did_you_mean

_OWNED_KEYS = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_clipping": "trainer.gradient_clip_val",
    "fp16.enabled": "trainer.precision",
    "bf16.enabled": "trainer.precision",
    "optimizer": "model.optimizer",
    "scheduler": "model.schedule",
    "zero_optimization.stage": "deepspeed.stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload_param",
    "zero_optimization.offload_optimizer.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.offload_param.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "deepspeed.offload_param",
    "zero_optimization.overlap_comm": "deepspeed.overlap_comm",
    "zero_optimization.reduce_bucket_size": "deepspeed.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "deepspeed.reduce_bucket_size",
}
"""Keys of DeepSpeed's JSON that a user's file cannot set, with the key of our config that sets each."""

_UNSAFE_KEYS = {
    "zero_optimization.offload_optimizer.pipeline_read": "reads gradients before they are written",
    "zero_optimization.offload_optimizer.pipeline_write": "leaves a write open while a checkpoint is saved",
    "data_types.grad_accum_dtype": "makes DeepSpeed, with stage 1, use another optimizer, whose state checkpoints would omit",
}
"""Keys of DeepSpeed's JSON that would give wrong results, and why."""


def deepspeed_config(options: DeepSpeedOptions, folder: Path | None = None) -> dict[str, Any]:
    """Merge the options with the user's JSON file into DeepSpeed's JSON config.

    Args:
        folder: Folder for this rank's NVMe offload, instead of ``options.nvme_path``.

    Raises:
        UsageError: The options contradict each other, or the JSON sets what a key of our config sets.
    """
    zero: dict[str, Any] = {
        "stage": options.stage,
        "overlap_comm": options.overlap_comm,
        "reduce_bucket_size": options.reduce_bucket_size,
        "allgather_bucket_size": options.reduce_bucket_size,
        "contiguous_gradients": True,
    }
    if options.reduce_bucket_size < 1:
        raise UsageError(f"deepspeed.reduce_bucket_size: {options.reduce_bucket_size} must be 1 or more.")
    check_offload(options)
    for key, place in (("offload_optimizer", options.offload_optimizer), ("offload_param", options.offload_param)):
        if place != "none":
            zero[key] = {"device": place}
        if place == "nvme":
            zero[key]["nvme_path"] = str(folder or options.nvme_path)
            # DeepSpeed keeps buffers for four sub-groups in memory, 4 bytes per element; its default of 1e9 holds most models.
            zero["sub_group_size"] = 100_000_000
    own = {
        "train_micro_batch_size_per_gpu": 1,  # used only for DeepSpeed's own count of samples
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return _deep_merge(own, _read_json_config(options.config, options.stage)) if options.config else own


def check_offload(options: DeepSpeedOptions) -> None:
    """Raise UsageError if the stage does not allow an offload, or its folder is not set."""
    nvme = [name for name in ("offload_optimizer", "offload_param") if getattr(options, name) == "nvme"]
    for name in nvme:
        check_tested_version("deepspeed", f"deepspeed.{name}: 'nvme'")
        if options.nvme_path is None:
            raise UsageError(
                f"deepspeed.nvme_path: must be set for deepspeed.{name}: nvme; give a folder on a disk of each node."
            )
    for name in [*nvme, *(["offload_param"] if options.offload_param != "none" else [])]:
        if options.stage != 3:
            raise UsageError(f"deepspeed.{name}: {getattr(options, name)!r} needs deepspeed.stage 3; it is {options.stage}.")
    if options.nvme_path is not None and not nvme:
        raise UsageError(
            f"deepspeed.nvme_path: {options.nvme_path} is not used: neither deepspeed.offload_optimizer nor "
            "deepspeed.offload_param is nvme; set one, or remove nvme_path."
        )


def missing_nvme_folder(path: Path, where: str = "") -> str:
    """Message about a folder for offloading that does not exist; ``where`` may name the node."""
    return f"deepspeed.nvme_path: {path} does not exist{where}; give an existing folder on a disk of each node."


def _read_json_config(path: Path, stage: int) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"deepspeed.config: {path} cannot be read as JSON ({reason}).") from None
    if not isinstance(content, dict):
        raise UsageError(expected_mapping(f"deepspeed.config: {path}", content))
    known = _known_top_level_keys()
    for name in content:
        if known and name not in known:
            raise UsageError(f"deepspeed.config: {name} in {path} is not a DeepSpeed key{did_you_mean(name, known)}")
    for name in ("fp16", "bf16", "zero_optimization"):
        if not isinstance(content.get(name, {}), dict):
            raise UsageError(f"deepspeed.config: {name} ({content[name]!r}) in {path} must be a mapping.")
    for name, value in _dotted_items(content):
        where = f"deepspeed.config: {name} ({value!r}) in {path}"
        if value == "auto":
            raise UsageError(f"{where} is not filled in by lockstep; set a value or remove it.")
        if name in _OWNED_KEYS and value is not None:
            raise UsageError(f"{where} is set by {_OWNED_KEYS[name]}; remove it.")
        if name in _UNSAFE_KEYS and value and (stage == 1 or name != "data_types.grad_accum_dtype"):
            raise UsageError(f"{where} {_UNSAFE_KEYS[name]}; remove it.")
    return content


def _known_top_level_keys() -> set[str]:
    """Candidates for DeepSpeed's top-level keys: all such strings in its sources; empty if it is not installed."""
    found = importlib.util.find_spec("deepspeed")
    folders = found.submodule_search_locations or [] if found else []
    files = [file for folder in folders for part in ("constants", "config") for file in Path(folder).glob(f"**/{part}.py")]
    return {name for file in files for name in re.findall(r"""["']([a-z][a-z0-9_]+)["']""", file.read_text(errors="replace"))}


def _dotted_items(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values with their dotted keys, also those that are mappings."""
    for key, value in content.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _dotted_items(value, f"{prefix}{key}.")


def _deep_merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; ``changes`` override ``base``."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _deep_merge(merged[key], value) if nested else value
    return merged
