"""What several tests of this folder need."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import wait_until


@pytest.fixture
def freezer(tmp_path: Path) -> Iterator[Path]:
    """A freezer of cgroups v1: SIGKILL does not end a frozen process, as if it waited for a disk that is gone."""
    group = Path("/sys/fs/cgroup/freezer") / f"lockstep-{os.getpid()}-{tmp_path.name}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"the test needs root and the freezer of cgroups v1 ({error})")
    yield group
    (group / "freezer.state").write_text("THAWED")
    wait_until(lambda: not (group / "cgroup.procs").read_text(), 20)
    group.rmdir()
