"""DeepSpeed's own config, from the options of a run. No torch here: contradictions are told before anything is queued."""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.compat import check_tested_version
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
"""Keys of DeepSpeed's JSON that say what a key of ours says."""


_UNSAFE_KEYS = {
    "zero_optimization.offload_optimizer.pipeline_read": "reads gradients that are not there yet",
    "zero_optimization.offload_optimizer.pipeline_write": "leaves a write open while a checkpoint is taken",
    "data_types.grad_accum_dtype": "has DeepSpeed, with stage 1, take another optimizer, whose state no checkpoint would have",
}
"""Keys of DeepSpeed's JSON that would go wrong here, and why."""


def deepspeed_config(options: DeepSpeedOptions, folder: Path | None = None) -> dict[str, Any]:
    """DeepSpeed's own config: what the options say, and a user's JSON with what they do not.

    Args:
        options: Of the run.
        folder: What this rank offloads to NVMe goes there, not into ``options.nvme_path`` itself.

    Raises:
        UsageError: The options contradict each other, or the JSON says what another key says.
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
            # DeepSpeed has buffers in memory for four of these, of 4 bytes each: with its own 1e9, for most models entirely.
            zero["sub_group_size"] = 100_000_000
    own = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own count of samples needs it
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return _deep_merge(own, _read_json_config(options.config, options.stage)) if options.config else own


def check_offload(options: DeepSpeedOptions) -> None:
    """Raise UsageError about an offload that the stage does not allow, or that has no place to go to."""
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
            f"deepspeed.nvme_path: {options.nvme_path} is of no use: neither deepspeed.offload_optimizer nor "
            "deepspeed.offload_param is nvme; set one, or leave it out."
        )


def missing_nvme_folder(path: Path, where: str = "") -> str:
    """About a folder for offloading that does not exist; ``where`` may name the node."""
    return f"deepspeed.nvme_path: there is no folder {path}{where}; give one on a disk of each node, which must exist."


def _read_json_config(path: Path, stage: int) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"deepspeed.config: {path} cannot be read as JSON ({reason}).") from None
    if not isinstance(content, dict):
        raise UsageError(f"deepspeed.config: {path} must hold keys with values.")
    known = _known_top_level_keys()
    for name in content:
        if known and name not in known:
            raise UsageError(f"deepspeed.config: {name} in {path} is no key of DeepSpeed's{did_you_mean(name, known)}")
    for name in ("fp16", "bf16", "zero_optimization"):
        if not isinstance(content.get(name, {}), dict):
            raise UsageError(f"deepspeed.config: {name} ({content[name]!r}) in {path} must hold keys with values.")
    for name, given in _leaves(content):
        if given == "auto":
            raise UsageError(
                f"deepspeed.config: {name} ('auto') in {path} is for another trainer; give a value, or take it out."
            )
        if name in _UNSAFE_KEYS and given and (stage == 1 or name != "data_types.grad_accum_dtype"):
            raise UsageError(f"deepspeed.config: {name} ({given!r}) in {path} {_UNSAFE_KEYS[name]}; take it out of the file.")
    for name, ours in _OWNED_KEYS.items():
        value: Any = content
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            raise UsageError(f"deepspeed.config: {name} ({value!r}) in {path} is decided by {ours}; take it out of the file.")
    return content


def _known_top_level_keys() -> set[str]:
    """The first keys that DeepSpeed may know: all texts in its sources that could be one. Empty where it is not installed."""
    found = importlib.util.find_spec("deepspeed")
    folders = found.submodule_search_locations or [] if found else []
    files = [file for folder in folders for part in ("constants", "config") for file in Path(folder).glob(f"**/{part}.py")]
    return {name for file in files for name in re.findall(r"""["']([a-z][a-z0-9_]+)["']""", file.read_text(errors="replace"))}


def _leaves(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """All values that are no mappings, with their keys."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _deep_merge(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        merged[key] = (
            _deep_merge(merged[key], value) if isinstance(merged.get(key), dict) and isinstance(value, dict) else value
        )
    return merged
