"""Read the offline files of W&B with W&B's own reader, ``wandb leet inspect``."""

import json
import subprocess
from pathlib import Path
from typing import Any

from wandb.util import get_core_path


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a run folder, over all of its offline parts in their order."""
    records = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        # The program behind `wandb leet inspect`; starting Python for it takes 1.5 s.
        command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        records += [json.loads(line) for line in output.splitlines()]
    return records


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's history, in their order."""
    return [record["history"]["item"] for record in read_records(folder) if record.get("type") == "history"]
