"""The lock of a build that was killed does not block later builds; forked processes with torch's own class."""

import logging
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
from support.waiting import wait_until
from torch.utils.file_baton import FileBaton

from lockstep.compat import torch_builds
from lockstep.compat.torch_builds import recover_build_locks


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """The lock file of a build in an empty folder."""
    recover_build_locks()
    return tmp_path / "lock"


def build(lock: Path, pipe: Any) -> None:
    """Send whether this process got the lock, and release it after a message."""
    baton = FileBaton(str(lock), wait_seconds=0.01)
    pipe.send(baton.try_acquire())
    pipe.recv()
    baton.release()
    pipe.send("released")


def start_build(lock: Path) -> "tuple[int, Connection]":
    """Build in a forked process; return its number and its pipe."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=build, args=(lock, there), daemon=True)
    process.start()
    assert process.pid is not None
    return process.pid, here


def test_one_of_those_that_wait_takes_over_the_lock_of_a_killed_build(lock: Path) -> None:
    pid, pipe = start_build(lock)
    assert pipe.recv() is True
    waiting = [start_build(lock)[1] for _ in range(3)]
    assert not wait(waiting, 0.3)
    os.kill(pid, signal.SIGKILL)
    (first,) = (pipe for pipe in wait(waiting, 30) if isinstance(pipe, Connection))
    assert first.recv() is True
    others = [pipe for pipe in waiting if pipe is not first]
    assert not wait(others, 0.3)
    first.send("")
    assert first.recv() == "released" and not lock.exists()
    assert [pipe.recv() for pipe in others] == [False, False]  # built meanwhile


def test_the_lock_of_a_build_that_was_killed_earlier_is_named_and_taken_over(
    lock: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pid, pipe = start_build(lock)
    assert pipe.recv() is True
    os.kill(pid, signal.SIGKILL)
    baton = FileBaton(str(lock))
    with caplog.at_level(logging.WARNING, "lockstep"):
        assert baton.try_acquire() is True
    assert f"{lock} was left by a build that was killed" in caplog.text
    baton.release()
    assert not lock.exists()


def test_a_process_that_waits_does_not_lock_the_file_of_a_build_that_starts(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.touch()
    locked: list[Any] = []
    monkeypatch.setattr(torch_builds, "_lock", locked.append)
    monkeypatch.setattr(time, "sleep", lambda seconds: lock.unlink())  # the build ends
    assert FileBaton(str(lock)).try_acquire() is False
    assert locked == []


def test_the_lock_of_a_process_without_lockstep_is_respected_for_half_an_hour(lock: Path) -> None:
    lock.touch()
    _, pipe = start_build(lock)
    assert not pipe.poll(0.3)
    long_ago = time.time() - 2000
    os.utime(lock, (long_ago, long_ago))
    wait_until(pipe.poll)
    assert pipe.recv() is True
