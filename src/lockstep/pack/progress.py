"""Show the progress of a packing: at the bottom of a terminal, or in a new line every 30 seconds."""

import os
import sys
import time
from pathlib import Path
from types import TracebackType

from lockstep.core import LiveLine, count, is_terminal
from lockstep.pack.workers import Totals

_INTERVAL_SECONDS, _INTERVAL_ELSEWHERE = 0.2, 30.0


class PackingLine:
    """Context manager that shows the progress of packing ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._name = str(folder)
        self._line = LiveLine() if is_terminal(sys.stderr, os.environ) else None
        self._what, self._start, self._next = "", 0.0, 0.0

    def __enter__(self) -> "PackingLine":
        if self._line is not None:
            self._line.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._line is not None:
            self._line.close()

    def show(self, what: str, totals: Totals, samples: int) -> None:
        """Show the activity ``what``, and how many of ``samples`` are done."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._start, self._next = what, now, now + (_INTERVAL_ELSEWHERE if self._line is None else 0)
        if now < self._next:
            return
        self._next = now + (_INTERVAL_ELSEWHERE if self._line is None else _INTERVAL_SECONDS)
        rate = totals.samples / max(now - self._start, 1e-3)
        parts = [f"{what} {self._name}"]
        if samples:
            parts += [f"{totals.samples:,}/{samples:,} samples", f"{totals.bytes / 1e6:,.0f} MB", f"{rate:,.0f} samples/s"]
            parts.append(f"{(samples - totals.samples) / rate:,.0f} s left" if rate else "")
        else:
            parts.append(count(totals.pieces, "shard"))
        if self._line is not None:
            self._line.show(parts)
        else:
            print("  ".join(filter(None, parts)), file=sys.stderr, flush=True)
