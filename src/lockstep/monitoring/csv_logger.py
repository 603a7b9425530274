"""The metrics file ``metrics.csv``: one row for every logged step, without repeats after a restart."""

import csv
import errno
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from io import FileIO, StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from lockstep.runs import METRICS_ROW, read_metrics

log = logging.getLogger(__name__)


class CsvMetricsLogger:
    """Append one row per logged step to ``metrics.csv``: its number, step, epoch, then the metrics in the order of appearance.

    A checkpoint saves the number of rows. A resumed run continues from that number, and does not write rows that are already
    in the file.

    Each attempt replaces ``metrics.csv`` with a copy and keeps that open. An older attempt that still runs writes to the
    replaced file, which has no name any more. So writing a row needs no ownership check.

    Args:
        path: The file.
        step: Returns the number of optimizer steps done; Lightning's own step starts at 0.
        check_owner: Called before the file is replaced; raises Superseded if a newer attempt has claimed the run.
        is_writer: Whether this rank writes the file; the others do not read it either.

    Attributes:
        row_count: Number of rows logged so far in the run.
        newest_row: Number of the newest row that is written or pending.
        latest: The latest value of every metric.
        logged_in: The number of the row with that value.
    """

    def __init__(
        self, path: Path, step: Callable[[], int], check_owner: Callable[[], None] = lambda: None, is_writer: bool = True
    ) -> None:
        self.path, self._step, self._check_owner, self._is_writer = path, step, check_owner, is_writer
        self.row_count = self.newest_row = 0
        self.latest: dict[str, float] = {}
        self._later_steps: dict[int, int] = {}  # steps of the rows after the checkpoint, by row number
        self.logged_in: dict[str, int] = {}
        self._columns: list[str] = []
        self._pending: list[dict[str, Any]] = []
        self._file: FileIO | None = None
        if is_writer:
            self.flush(sync=False)

    def resume(self, row_count: int) -> None:
        """Continue after the first ``row_count`` rows of the run; log a warning if the file has lost some."""
        self.row_count = row_count
        if self._is_writer:
            steps = {int(row[METRICS_ROW]): int(row["step"]) for row in read_metrics(self.path)}
            self._later_steps = {number: step for number, step in steps.items() if number > row_count}
            if (found := len(steps) - len(self._later_steps)) < row_count:
                log.warning("%s has %d of the %d rows before the checkpoint", self.path, found, row_count)
            self.newest_row = max(self.newest_row, row_count)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Append one row; new metrics become new columns."""
        metrics = {name: float(value) if isinstance(value, bool) else value for name, value in metrics.items()}
        self.latest |= metrics
        self.row_count += 1
        step = self._step()
        # Keep a row of an earlier step: the final test of a finished run that trains further.
        while self._later_steps.get(self.row_count, step) < step:
            self.row_count += 1
        self.logged_in |= dict.fromkeys(metrics, self.row_count)
        if self.row_count > self.newest_row:
            self.newest_row = self.row_count
            place = {METRICS_ROW: self.row_count, "step": step, "epoch": metrics.get("epoch", "")}
            self._pending.append(place | dict(metrics))
            self.flush(sync=False)

    def rows_after(self, number: int) -> list[dict[str, Any]]:
        """The logged rows with numbers above ``number`` that are in the file or pending."""
        rows = [*read_metrics(self.path), *self._pending] if number < self.row_count else []
        return [row for row in rows if number < int(row[METRICS_ROW]) <= self.row_count]

    def flush(self, sync: bool = True) -> bool:
        """Write pending rows, to disk if ``sync``, and return whether that succeeded, so that a checkpoint can be saved."""
        try:
            if self._file is None:
                self._take_over()
            if self._pending:
                self._append()
            if sync and self._file is not None:
                if not self._is_in_place(self._file):  # an editor, or an attempt that was paused while writing, has replaced it
                    self._replace(_read(self._file))
                os.fsync(self._file.fileno())
            return True
        except OSError as error:
            if error.errno == errno.ESTALE:  # removed by another NFS client: continue from what is there
                self.close()
            log.warning("%s cannot be written (%s); training continues, its rows are kept in memory", self.path, error.strerror)
            return False

    def close(self) -> None:
        """Close the file; the next row reopens it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take_over(self) -> None:
        """Replace the file of earlier attempts, if it exists, with a copy that none of them has open."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        content = content[: content.rfind(b"\n") + 1]  # a killed process may leave an incomplete line
        try:
            rows = _parse(content)
        except (ValueError, TypeError, csv.Error) as error:
            self._check_owner()
            aside = self.path.replace(self.path.with_name(f"{self.path.name}.damaged"))
            log.warning("%s is damaged (%s); it is kept as %s, and its rows are missing", self.path, error, aside.name)
            return
        self._replace(content)
        self._columns = list(rows[0] if rows else ())
        newest = int(rows[-1][METRICS_ROW]) if rows else 0
        self.newest_row = max(self.newest_row, newest)
        self._pending = [row for row in self._pending if row[METRICS_ROW] > newest]

    def _append(self) -> None:
        """Append all pending rows, or none of them."""
        names = dict.fromkeys(name for row in self._pending for name in row)
        added = [name for name in names if name not in self._columns]
        if added or self._file is None:
            columns = [*self._columns, *added]
            rows = _parse(_read(self._file)) if self._file is not None else []
            self._replace(_format(columns, rows, header=True))
            self._columns = columns
        assert self._file is not None
        end = self._file.tell()
        try:
            _write(self._file, _format(self._columns, self._pending))
        except OSError:
            self._file.seek(end)
            self._file.truncate()
            raise
        self._pending.clear()

    def _replace(self, content: bytes) -> None:
        """Replace the file atomically with one that has ``content`` and that only this attempt has open."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        file = FileIO(temporary, "w+")
        try:
            _write(file, content)
            os.fsync(file.fileno())
            self._check_owner()
            temporary.replace(self.path)
        except Exception:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        self.close()
        self._file = file

    def _is_in_place(self, file: FileIO) -> bool:
        return self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat())


def _write(file: FileIO, content: bytes) -> None:
    while content:  # a disk that becomes full takes only part of it
        content = content[file.write(content) :]


def _read(file: FileIO) -> bytes:
    """Read all of ``file``; leaves its position at the end."""
    file.seek(0)
    return file.readall()


def _format(columns: list[str], rows: Iterable[Mapping[str, Any]], header: bool = False) -> bytes:
    text = StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parse(content: bytes) -> list[dict[str, str]]:
    """Parse ``content``; raise TypeError or ValueError unless all values are numbers and the row numbers increase."""
    rows = list(csv.DictReader(StringIO(content.decode(), newline="")))
    numbers = [0]
    for row in rows:
        int(row.get("step", ""))
        numbers.append(int(row.get(METRICS_ROW, "")))
        for value in row.values():
            float(value or 0)
    if any(number <= previous for previous, number in pairwise(numbers)):
        raise ValueError("its rows are not in order")
    return rows
