"""The rows of a W&B run's history: each is sent once, over all restarts, whether lockstep or user code logs it.

W&B's step numbers all rows: those of ``metrics.csv`` and those that user code logs with ``wandb.log``. A checkpoint saves the
number of the next row. A resumed run repeats the calls from there; rows that W&B already has are counted but not sent.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lockstep.runs import METRICS_ROW

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

GLOBAL_STEP = "trainer/global_step"
"""Key of the number of optimizer steps done, the x axis of all charts."""

_KEPT_ROWS = 100
"""Number of newest rows to send again after W&B's service was killed, which loses some."""


class WandbHistory:
    """Number and send the rows of a W&B run.

    Args:
        step: Returns the number of optimizer steps done.

    Attributes:
        next_row: Number of the next row.
        pending: Values of the next row that user code has logged so far, with ``commit=False`` or ``step``.
        metrics_rows: Number of rows of ``metrics.csv`` that W&B has.
        sent_at: When the newest row was sent, by the monotonic clock.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self._steps_done = step
        self.next_row = self.metrics_rows = 0
        self.sent_at = 0.0
        self.pending: dict[str, Any] = {}
        self._end = 0  # W&B has all rows below
        self._newest: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_KEPT_ROWS)
        self._run: wandb.Run | None = None
        self._write: Callable[..., None] | None = None

    def attach(self, run: "wandb.Run", end: int, metrics_rows: int, on_user_log: Callable[..., None]) -> None:
        """Send all further rows to ``run``, which was just started, and first those of the newest rows that it lacks.

        Args:
            run: The W&B run.
            end: Number of the first row that it lacks.
            metrics_rows: Number of rows of ``metrics.csv`` that it has.
            on_user_log: Receives all calls that log to ``run``, with the arguments of ``log_user_row``.
        """
        from lockstep.compat.wandb import intercept_log, release_media

        self._run, self._write = run, intercept_log(run, on_user_log)
        self._end, self.metrics_rows = end, metrics_rows
        for number, row in self._newest:
            if number >= end:
                release_media(row)
                try:
                    self._write_row(number, row)
                except OSError as error:  # the file of an image or other media is gone
                    log.warning("W&B lacks the media of its row %d (%s)", number, error)
                    self._write_row(
                        number, {name: value for name, value in row.items() if isinstance(value, str | int | float)}
                    )

    def log_metrics_row(self, number: int, step: int, values: Mapping[str, float]) -> None:
        """Send row ``number`` of ``metrics.csv``, counted from 1, unless W&B has it."""
        row = {**self.pending, **values, GLOBAL_STEP: step, METRICS_ROW: number}
        is_new = number > self.metrics_rows
        place = max(self.next_row, self._end) if is_new else self.next_row
        self.next_row, self.pending = place + 1, {}
        if is_new:
            self._send(place, row)

    def log_user_row(self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Send what user code logs, unless W&B has it; the arguments are those of ``wandb.Run.log``.

        Data with a ``step`` below that of the newest row, which W&B would drop, becomes a new row.
        """
        is_late = step is not None and step < self.next_row
        if step is not None and step > self.next_row:
            self.commit()
            self.next_row = step
        self.pending |= {GLOBAL_STEP: self._steps_done(), **{name: to_python(value) for name, value in data.items()}}
        if commit or (commit is None and (step is None or is_late)):
            self.commit()

    def commit(self) -> None:
        """Complete and send the row that user code has started, if any."""
        if self.pending:
            number, row = self.next_row, self.pending
            self.next_row, self.pending = number + 1, {}
            if number >= self._end:
                self._send(number, row)

    def _send(self, number: int, row: dict[str, Any]) -> None:
        self._newest.append((number, row))
        self._write_row(number, row)

    def _write_row(self, number: int, row: dict[str, Any]) -> None:
        from lockstep.compat.wandb import set_step

        assert self._run is not None and self._write is not None
        set_step(self._run, number)
        self._write(row, step=number, commit=True)
        self.sent_at = time.monotonic()
        self.metrics_rows = max(self.metrics_rows, row.get(METRICS_ROW, 0))


def to_python(value: Any) -> Any:
    """Convert a scalar of torch or numpy to a Python number; return any other ``value`` as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value
