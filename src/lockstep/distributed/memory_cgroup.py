"""The memory cgroup of this process, version 1 or 2: its limit, and how many processes the kernel has killed in it."""

import re
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lockstep.core import format_bytes

_UNLIMITED = 1 << 60
"""Version 1 reports no limit as a number near 2**63."""


@dataclass(frozen=True)
class MemoryCgroup:
    """A memory cgroup.

    Attributes:
        folder: Its folder; None on a system without cgroups.
        root: Folder of the root cgroup.
        version: 1 or 2.
    """

    folder: Path | None
    root: Path
    version: int

    @classmethod
    def of_this_process(cls, table: str | None = None, mounts: Path = Path("/sys/fs/cgroup")) -> "MemoryCgroup":
        """Find it; ``table`` has the lines of ``/proc/self/cgroup``."""
        if table is None:
            with suppress(OSError):
                table = Path("/proc/self/cgroup").read_text()
        # A machine may have both: then memory belongs to version 1.
        for version, pattern, root in ((1, r"^\d+:memory:/(.*)", mounts / "memory"), (2, r"^0::/(.*)", mounts)):
            if found := re.search(pattern, table or "", re.MULTILINE):
                return cls(root / found[1], root, version)
        return cls(None, mounts, 2)

    def count_kills(self) -> int:
        """Number of processes of this cgroup that the kernel has killed for lack of memory."""
        if self.folder is None:
            return 0
        with suppress(OSError):
            events = (self.folder / ("memory.oom_control" if self.version == 1 else "memory.events")).read_text()
            return int(dict(line.split() for line in events.splitlines()).get("oom_kill", "0"))
        return 0

    @property
    def limit(self) -> int | None:
        """The smallest limit in bytes, of this cgroup or one above it; None without one."""
        name = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        limits = []
        if self.folder is not None:
            for folder in (self.folder, *self.folder.parents):
                with suppress(OSError, ValueError):  # "max" is none
                    limits.append(int((folder / name).read_text()))
                if folder == self.root:
                    break
        return min((limit for limit in limits if limit < _UNLIMITED), default=None)


class MemoryWatch:
    """Notices that the kernel has killed a process of this cgroup since it was made."""

    def __init__(self, cgroup: MemoryCgroup | None = None) -> None:
        self._cgroup = cgroup or MemoryCgroup.of_this_process()
        self._kills, self._peak = self._cgroup.count_kills(), _peak_of_children()

    @property
    def has_killed(self) -> bool:
        return self._cgroup.count_kills() > self._kills

    def __str__(self) -> str:
        """Who is out of memory, and the peak of the largest process that has ended since."""
        limit, peak = self._cgroup.limit, _peak_of_children()
        who = "the machine" if limit is None else f"the job, which may use {format_bytes(limit)} on this node,"
        return f"{who} is out of memory" + (f"; its largest process had {format_bytes(peak)}" if peak > self._peak else "")


def _peak_of_children() -> int:
    """Peak memory in bytes of the largest descendant of this process that has ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
