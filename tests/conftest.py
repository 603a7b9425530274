"""Environment of all tests, and the fixture that starts a run."""

import os

# Ranks are forked from this process, and a thread pool does not survive a fork: torch must not create one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks use gloo on CPUs
os.environ["DS_ACCELERATOR"] = "cpu"

import gc

gc.disable()  # a quarter of the time of imports; see ``pytest_collection_finish``

import atexit
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import requests  # noqa: F401  # W&B imports it in each run; forked ones have both
import wandb  # noqa: F401
from support.runs import Launch, Outcome

from lockstep.cli import local
from lockstep.config import with_config
from lockstep.config.validation import validate_arguments
from lockstep.core.logging import reset_logging
from lockstep.monitoring import report
from lockstep.trainer.config_parser import make_parser

# In a fork, a garbage collection would copy the memory of the parent, and end objects of other tests. What the finalizer of one
# prints with a traceback makes ast.parse fail, if the collection came in the middle of that (a fault of Python 3.11).
os.register_at_fork(after_in_child=gc.freeze)

# Tests that run in the background inherit an ignored SIGINT, which no shell can trap.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["support.slurm_cluster"]  # the fixtures of tests/slurm


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of each of two clusters, and those of DeepSpeed, to one worker each, first.

    The former share a cluster, and wait more than they compute. The latter share the import of DeepSpeed and undisturbed runs.
    """
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: ("submissions", "slurm", "deepspeed", "").index(groups[item]))


def pytest_collection_finish() -> None:
    """Exempt all modules from garbage collections, which would take half a second each time."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # nanobind prints a warning about objects that the last collection does not visit
    gc.enable()


def _group(item: pytest.Item) -> str:
    if "slurm_is_here" in getattr(item, "fixturenames", ()):
        return "submissions" if item.path.name in ("test_submit.py", "test_faults.py") else "slurm"
    return "deepspeed" if "strategies" in item.path.parts else ""


@pytest.fixture
def drawn_report() -> None:
    """Let the runs of a test draw their report. Those of others do not: it is a quarter of the time of a short run."""


@pytest.fixture(autouse=True)
def quiet_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove keys and variables of a launcher, and disable W&B and the report unless a test enables them."""
    for name in ("WANDB_API_KEY", "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a launcher removes it
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    if "drawn_report" not in request.fixturenames:
        monkeypatch.setattr(report, "draw", lambda run: None)
    yield
    reset_logging()


PROGRAM = "python launch/local.py"


def _main(command: list[str]) -> NoReturn:
    sys.exit(local.main(command, PROGRAM))


@pytest.fixture(scope="session")
def parser_is_made() -> None:
    """Make the parser and read the sources of common classes once, not in each fork."""
    make_parser()
    validate_arguments(with_config([]))


@pytest.fixture
def launch(tmp_path: Path, parser_is_made: None) -> Launch:
    """Run ``launch/local.py`` with some arguments: ``launch("--ranks", "2", …)``. The run folder is below ``tmp_path``.

    It runs in a fork, because a process that has run backward cannot fork ranks.
    """

    def start(*arguments: str) -> Outcome:
        root = tmp_path / "runs"
        before = set(root.glob("*/*"))
        command = [*arguments, "--run.root", str(root)]
        process = multiprocessing.get_context("fork").Process(target=_main, args=(command,))
        process.start()
        process.join()
        made = [folder for folder in root.glob("*/*") if folder not in before]
        assert process.exitcode is not None
        return Outcome(process.exitcode, made[0] if made else root)

    return start
