"""``metrics.csv``: a row for every logged step, once, however often a run restarts."""

import csv
import logging
import os
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lockstep.core import atomic_write_text

log = logging.getLogger(__name__)


class CsvMetricsLogger(Logger):
    """Appends one row per logged step to ``metrics.csv``: step, epoch, then the metrics in the order of their appearance.

    Rows are counted. A run that goes on from a checkpoint counts on from what was logged when that was saved, and a row that
    is in the file already is not written again: what is logged twice, because steps are done twice, is there once.

    Args:
        path: The file.
        step: Number of optimizer steps done; lightning's own label counts from 0.

    Attributes:
        rows: How many rows were logged, up to here in the run.
        newest: The newest value of every metric.
    """

    def __init__(self, path: Path, step: Callable[[], int]) -> None:
        super().__init__()
        self.path, self._step = path, step
        self.row_count = 0
        self.latest: dict[str, float] = {}
        self._columns: list[str] = []
        self._written = 0
        self._waiting: list[dict[str, Any]] = []
        if path.exists():
            _truncate_partial_line(path)
            self._columns, self._written = _columns(path), len(read_metrics(path))

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name

    @property
    def version(self) -> str:
        """There is one file per run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The config is saved elsewhere, whole."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row; new metrics become new columns."""
        self.latest |= metrics
        self.row_count += 1
        if self.row_count <= self._written:
            return
        self._written = self.row_count
        self._waiting.append({"step": self._step(), "epoch": metrics.get("epoch", "")} | dict(metrics))
        try:
            self._write()
        except OSError as error:
            log.warning("%s could not be written (%s); training goes on, and its rows wait", self.path, error.strerror)

    def _write(self) -> None:
        """Append what waits; all of it or nothing."""
        names = dict.fromkeys(name for row in self._waiting for name in row)
        if added := [name for name in names if name not in self._columns]:
            rows = read_metrics(self.path) if self.path.exists() else []
            text = StringIO(newline="")
            writer = csv.DictWriter(text, [*self._columns, *added])
            writer.writeheader()
            writer.writerows(rows)
            atomic_write_text(self.path, text.getvalue())
            self._columns += added
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerows(self._waiting)
        except OSError:
            os.truncate(self.path, size)
            raise
        self._waiting.clear()

    def flush(self) -> bool:
        """Write what waits, flush the file to disk, and say whether that was possible: a checkpoint counts on its rows."""
        try:
            if self._waiting:
                self._write()
            if self.path.exists():
                with self.path.open("a") as file:
                    os.fsync(file.fileno())
            return True
        except OSError as error:
            log.warning("%s could not be written (%s); training goes on, and its rows wait", self.path, error.strerror)
            return False


def _truncate_partial_line(path: Path) -> None:
    """Take off what a killed process has begun to write."""
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def _columns(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv``; a metric that a row does not have is an empty text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
