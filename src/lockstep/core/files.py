"""Write files atomically: write beside the target, flush to disk, rename."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def atomic_write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path`` atomically by ``content`` as JSON; NaN and infinity become null, since JSON has neither."""
    atomic_write_text(path, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of ``atomic_write_json``; a missing file reads as an empty mapping."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def atomic_write_text(path: Path, text: str) -> None:
    """Replace ``path`` atomically by ``text``: a reader sees the old file or the new one, never a part."""
    atomic_write(path, lambda temporary: temporary.write_text(text))


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Replace ``path`` atomically by the file that ``write(temporary_path)`` writes; an error leaves ``path`` as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        fsync(temporary)
        temporary.replace(path)
    except Exception:
        temporary.unlink(missing_ok=True)
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
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
