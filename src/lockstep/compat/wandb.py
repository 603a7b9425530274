"""Undocumented names of W&B; importing it takes a second and a half."""

import json
import subprocess
from pathlib import Path

import wandb.util

from lockstep.compat import private

_get_core_path = private("wandb", wandb.util, "get_core_path")


def last_logged_step(file: Path, timeout: float) -> int:
    """The highest history step in an offline ``.wandb`` file; 0 if it holds none.

    Raises:
        subprocess.TimeoutExpired: Reading took more than ``timeout`` seconds.
    """
    # What `wandb leet inspect` runs, without the time to start Python.
    command = [_get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=timeout).stdout.splitlines()
    records = [json.loads(line) for line in lines if '"history"' in line]
    return max((int(record["history"]["item"]["_step"]) for record in records if record.get("type") == "history"), default=0)
