"""The metrics file ``metrics.csv``: one row for every logged step, without repeats after a restart."""

import csv
import logging
import os
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from lockstep.core import atomic_write_text, fsync

log = logging.getLogger(__name__)


class CsvMetricsLogger:
    """Appends one row per logged step to ``metrics.csv``: step, epoch, then the metrics in the order of appearance.

    Rows are counted. A resumed run counts on from the number of rows that its checkpoint saved, and does not write rows that
    are in the file already.

    Args:
        path: The file.
        step: Returns the number of optimizer steps done; Lightning's own step starts at 0.
        check_owner: Called before each write; raises Superseded where this attempt must not write any more.
        is_writer: Whether this rank writes the file; the others do not read it either.

    Attributes:
        row_count: Number of rows logged so far in the run.
        latest: The latest value of every metric.
    """

    def __init__(
        self, path: Path, step: Callable[[], int], check_owner: Callable[[], None] = lambda: None, is_writer: bool = True
    ) -> None:
        self.path, self._step, self._check_owner, self._is_writer = path, step, check_owner, is_writer
        self.row_count = 0
        self.latest: dict[str, float] = {}
        self._columns: list[str] = []
        self._rows_in_file = 0
        self._pending: list[dict[str, Any]] = []
        if is_writer and path.exists():
            _truncate_partial_line(path)
            try:
                rows = _check_rows(read_metrics(path))
                self._columns, self._rows_in_file = list(rows[0] if rows else ()), len(rows)
            except (ValueError, TypeError, csv.Error) as error:
                aside = path.replace(path.with_name(f"{path.name}.damaged"))
                log.warning("%s is damaged (%s); it is kept as %s, and its rows are missing", path, error, aside.name)

    def resume(self, row_count: int) -> None:
        """Continue after the first ``row_count`` rows of the run; those that the file has lost are missing in it."""
        self.row_count = row_count
        if self._is_writer and self._rows_in_file < row_count:
            log.warning("%s has %d of the %d rows before the checkpoint", self.path, self._rows_in_file, row_count)
            self._rows_in_file = row_count

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Append one row; new metrics become new columns."""
        metrics = {name: float(value) if isinstance(value, bool) else value for name, value in metrics.items()}
        self.latest |= metrics
        self.row_count += 1
        if self.row_count > self._rows_in_file:
            self._rows_in_file = self.row_count
            self._pending.append({"step": self._step(), "epoch": metrics.get("epoch", "")} | dict(metrics))
            self.flush(sync=False)

    def flush(self, sync: bool = True) -> bool:
        """Write pending rows, to disk if ``sync``, and return whether that succeeded, so that a checkpoint can be saved."""
        try:
            if self._pending:
                self._append_pending()
            if sync and self.path.exists():
                fsync(self.path)
            return True
        except OSError as error:
            log.warning("%s cannot be written (%s); training continues, its rows are kept in memory", self.path, error.strerror)
            return False

    def _append_pending(self) -> None:
        """Append all pending rows, or none of them."""
        self._check_owner()
        names = dict.fromkeys(name for row in self._pending for name in row)
        if added := [name for name in names if name not in self._columns]:
            text = StringIO(newline="")
            writer = csv.DictWriter(text, [*self._columns, *added])
            writer.writeheader()
            writer.writerows(read_metrics(self.path))
            atomic_write_text(self.path, text.getvalue())
            self._columns += added
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerows(self._pending)
        except OSError:
            os.truncate(self.path, size)
            raise
        self._pending.clear()


def _truncate_partial_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process left."""
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def _check_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return ``rows``; raise TypeError or ValueError if they are not rows of numbers with a step."""
    for row in rows:
        int(row.get("step", ""))
        for value in row.values():
            float(value or 0)
    return rows


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv``, if it exists; a metric that a row does not have is an empty string."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
