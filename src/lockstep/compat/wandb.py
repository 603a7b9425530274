"""Undocumented names of W&B; importing it takes a second and a half."""

import json
import logging
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb
import wandb.util

from lockstep.compat import patch, private, private_imports

with private_imports("wandb"):
    from wandb.sdk.data_types.base_types.media import Media

log = logging.getLogger(__name__)

_get_core_path = private("wandb", wandb.util, "get_core_path")
private("wandb", wandb.Run, "_log")
private("wandb", Media, "is_bound")
private("wandb", wandb.Settings.model_fields.get("x_transaction_log_flush_interval"), "default")

LogFunction = Callable[..., None]


def read_history(file: Path, timeout: float) -> dict[int, dict[str, Any]]:
    """The rows of history in a ``.wandb`` file, by W&B's step; media are dicts with ``_type`` and ``path``.

    A file may be incomplete: it then has the rows before its end. A file that W&B cannot read at all has none.

    Raises:
        subprocess.TimeoutExpired: Reading took more than ``timeout`` seconds.
    """
    # What `wandb leet inspect` runs, without the time to start Python.
    command = [_get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if ended.returncode:
        log.warning("W&B cannot read %s (%s); its rows count as not sent", file, " ".join(ended.stderr.split()))
    records = [json.loads(line) for line in ended.stdout.splitlines() if '"history"' in line]
    items = [_nest_media(record["history"]["item"]) for record in records if record.get("type") == "history"]
    return {int(item["_step"]): item for item in items}


def _nest_media(item: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``item`` in which the parts of a medium, such as ``image.path``, are one dict again."""
    media = {name.removesuffix("._type") for name in item if name.endswith("._type")}
    nested: dict[str, Any] = {}
    for name, value in item.items():
        key, _, part = name.rpartition(".")
        if key in media:
            nested.setdefault(key, {})[part] = value
        else:
            nested[name] = value
    return nested


def intercept_log(run: wandb.Run, log: LogFunction) -> LogFunction:
    """Make ``log`` receive every call that logs a row to ``run``, from W&B's own functions too; return W&B's function."""
    original: LogFunction = private("wandb", run, "_log")
    patch("wandb", run, "_log", log)
    return original


def release_media(row: Mapping[str, Any]) -> None:
    """Allow media that were logged to one run object to be logged to another one, as after a restart of W&B's service."""
    for value in row.values():
        if isinstance(value, Media) and value.is_bound():
            patch("wandb", value, "_run", None)


def set_step(run: wandb.Run, step: int) -> None:
    """Set the number of the next row in ``run``, which is part of the names of media files."""
    patch("wandb", run, "_local_step", step)
