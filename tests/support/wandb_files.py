"""Read offline W&B files with W&B's own reader."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """The records in all offline W&B files of a run folder, in the order of the attempts."""
    records = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(reader, capture_output=True, text=True, check=True).stdout.splitlines()
        records += [json.loads(line) for line in lines]
    return records
