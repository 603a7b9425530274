"""A cache of the files in the newest snapshot of a folder: the next snapshot links those that have not changed since.

As in git's index, a file has not changed if its inode, size, mode and both times are the same.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_RECENT_NS = 2_000_000_000
"""A file that changed this recently may change again within one tick of its file system's clock, unnoticed."""


class CopiedFiles:
    """The files of one folder at its newest snapshot, and where their copies are.

    Args:
        path: File of the cache. If it is missing or damaged, all files are copied.
        secrets: Texts that no copied file contains. If they change, all files are searched again, and so copied.
    """

    def __init__(self, path: Path, secrets: Sequence[str]) -> None:
        self._path = path
        self._secrets = hashlib.sha256("\0".join(secrets).encode()).hexdigest()
        self._started = time.time_ns()
        known = self._read()
        self._copies, self._known = str(known.get("copies", "")), known.get("files", {})
        self._all_linked = True

    def link(self, name: str, state: os.stat_result, target: str) -> str:
        """Link ``target`` to the copy of the file ``name``, and return its SHA-256; an empty text if it must be copied."""
        known = self._known.get(name)
        if isinstance(known, list) and known[:-1] == _identity(state):
            copy = f"{self._copies}/{name}"
            with suppress(OSError):  # it is gone, or the target is on another file system
                found = os.stat(copy, follow_symlinks=False)
                if (found.st_size, found.st_mtime_ns, found.st_mode) == (state.st_size, state.st_mtime_ns, state.st_mode):
                    os.link(copy, target)
                    return str(known[-1])
        self._all_linked = False
        return ""

    def write(self, copies: Path, states: Mapping[str, os.stat_result], digests: Mapping[str, str]) -> None:
        """Record the files in the folder ``copies``, with their ``states`` from before they were read."""
        if self._all_linked:
            return
        before = self._started - _RECENT_NS
        files = {
            name: [*_identity(states[name]), digest] for name, digest in digests.items() if states[name].st_ctime_ns < before
        }
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with suppress(OSError):  # the home folder cannot be written
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_text(json.dumps({"copies": str(copies), "secrets": self._secrets, "files": files}))
            temporary.replace(self._path)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        is_known = isinstance(content, dict) and content.get("secrets") == self._secrets
        return content if is_known and isinstance(content.get("files"), dict) else {}


def _identity(state: os.stat_result) -> list[int]:
    return [state.st_ino, state.st_size, state.st_mode, state.st_mtime_ns, state.st_ctime_ns]
