"""Read ``metrics.csv``: one row for every logged step."""

import csv
from io import StringIO
from pathlib import Path

METRICS_ROW = "lockstep/row"
"""Name of the column with the row number, counted from 1, in ``metrics.csv`` and in W&B."""


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The complete rows of a ``metrics.csv``, if it exists; a metric that a row does not have is an empty string."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    complete = content[: content.rfind(b"\n") + 1]  # a run that trains or was killed may leave a partial line
    return list(csv.DictReader(StringIO(complete.decode(errors="replace"), newline="")))
