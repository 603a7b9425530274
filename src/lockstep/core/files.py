"""Files that are there whole or not at all: written beside, flushed to disk, renamed. No torch here."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def atomic_write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path`` by ``content`` as JSON.

    A number that is not finite becomes null, so that the file is JSON to every reader.

    Raises:
        OSError: It cannot be written; what was there before still is.
    """
    atomic_write_text(path, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_whole`` has written to ``path``; empty where there is nothing yet."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return content


def atomic_write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: It cannot be written; what was there before still is.
    """
    atomic_write(path, lambda beside: beside.write_text(text))


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Replace ``path`` by what ``write`` puts into the file that it is given.

    Raises:
        Exception: What ``write`` raises, or an OSError; what was there before still is.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        fsync(beside)
        beside.replace(path)
    except Exception:
        beside.unlink(missing_ok=True)
        raise


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and value - value != 0:
        return None
    return value
