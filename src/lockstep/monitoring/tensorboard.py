"""Write an event file for TensorBoard with the rows of ``metrics.csv``, each once over all restarts.

This module does not use TensorBoard, which takes seconds to import and is needed only to view the file. Its format: TFRecords
(https://www.tensorflow.org/tutorials/load_data/tfrecord) of the message ``Event`` (``event.proto`` of TensorBoard).
"""

import functools
import logging
import struct
import time
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path

from lockstep.runs import METRICS_ROW, read_metrics

log = logging.getLogger(__name__)

_POLYNOMIAL = 0x82F63B78
"""Of CRC-32C (Castagnoli), bits reversed."""


class TensorBoardWriter:
    """Write the rows of ``metrics.csv`` to ``<folder>/events.out.tfevents.…``.

    Each attempt starts its own file, which has all rows so far and tells TensorBoard to forget those of other files. So
    TensorBoard shows each row once, even after a kill. Of the other files only the newest is kept, as a running TensorBoard
    may be reading it. A file that cannot be written does not end the run.

    Args:
        metrics: ``metrics.csv``, which has the rows of earlier attempts.
        attempt: Number of the attempt.
        check_owner: Called before files of other attempts are removed; raises Superseded if a newer one has claimed the run.
    """

    def __init__(self, folder: Path, metrics: Path, attempt: int, check_owner: Callable[[], None] = lambda: None) -> None:
        self._folder, self._metrics, self._attempt, self._check_owner = folder, metrics, attempt, check_owner
        self._file: FileIO | None = None
        self._newest_row = 0
        self._try(self._start)

    def write(self, number: int, step: int, values: Mapping[str, float]) -> None:
        """Append row ``number`` of ``metrics.csv``, counted from 1, unless the file already has it."""
        if number > self._newest_row and self._file is not None:
            self._newest_row = number
            self._try(lambda: self._append(encode_event(time.time(), step, scalars=values)))

    def close(self) -> None:
        """Close the file; if a row could not be written, rewrite the whole file before."""
        if self._file is None:
            self._try(self._start)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _start(self) -> None:
        """Start a file with all rows of ``metrics.csv``."""
        self._folder.mkdir(exist_ok=True)
        now = time.time()
        path = self._folder / f"events.out.tfevents.{int(now)}.{self._attempt:06}"
        others = sorted(other for other in self._folder.glob("events.out.tfevents.*") if other != path)
        times = _row_times(others[-1]) if others else []
        events = [encode_event(now, version="brain.Event:2"), encode_event(now, is_start=True)]
        for index, row in enumerate(read_metrics(self._metrics)):
            values = {name: float(text) for name, text in row.items() if text and name not in (METRICS_ROW, "step")}
            events.append(encode_event(times[index] if index < len(times) else now, int(row["step"]), scalars=values))
            self._newest_row = int(row[METRICS_ROW])
        temporary = self._folder / f".{self._attempt}"
        self._file = FileIO(temporary, "w")
        try:
            self._append(b"".join(events))
            self._check_owner()
            temporary.replace(path)
        except Exception:
            self._file.close()
            temporary.unlink(missing_ok=True)
            raise
        for other in others[:-1]:
            other.unlink(missing_ok=True)

    def _append(self, content: bytes) -> None:
        assert self._file is not None
        while content:  # a disk that becomes full takes only part of it
            content = content[self._file.write(content) :]

    def _try(self, write: Callable[[], None]) -> None:
        """Call ``write``; after an OSError skip all rows until ``close``, which rewrites the whole file."""
        try:
            write()
        except OSError as error:
            if self._file is not None:
                self._file.close()
                self._file = None
            text = "TensorBoard's file in %s cannot be written (%s); training continues, and its rows are in %s"
            log.warning(text, self._folder, error.strerror, self._metrics)


def encode_event(
    wall_time: float,
    step: int = 0,
    *,
    version: str = "",
    is_start: bool = False,
    scalars: Mapping[str, float] | None = None,
) -> bytes:
    """One record of an event file.

    Args:
        wall_time: In seconds since 1970.
        version: Of the format, in the first event of a file.
        is_start: Whether TensorBoard must forget earlier events from ``step`` on.
        scalars: Values by tag.
    """
    event = b"\x09" + struct.pack("<d", wall_time)
    event += b"\x10" + _varint(step) if step else b""
    event += _field(3, version.encode()) if version else b""
    if scalars:
        event += _field(5, b"".join(_field(1, _field(1, tag.encode()) + _float(value)) for tag, value in scalars.items()))
    event += _field(7, b"\x08\x01") if is_start else b""
    length = struct.pack("<Q", len(event))
    return length + _masked_crc(length) + event + _masked_crc(event)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message: a text or another message."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _float(value: float) -> bytes:
    """The field ``simple_value``; numbers that are too large for a float32 become infinite."""
    try:
        return b"\x15" + struct.pack("<f", value)
    except OverflowError:
        return b"\x15" + struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


def _masked_crc(content: bytes) -> bytes:
    """The masked CRC-32C of a TFRecord."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in content:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _row_times(path: Path) -> list[float]:
    """The times of the rows in a file of ``TensorBoardWriter``, which may end with a partial row."""
    content, at = path.read_bytes(), 0
    times: list[float] = []
    while at + 21 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        times += struct.unpack_from("<d", content, at + 13)
        at += length + 16
    return times[2:]  # the first two events are not rows
