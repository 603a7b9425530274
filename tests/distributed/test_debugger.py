"""breakpoint() where no debugger can work; on a terminal: tests/cli/test_terminal.py."""

import os
import sys
from bdb import BdbQuit

import pytest
from torch.utils.data import DataLoader, Dataset

from lockstep.core import RunError, World
from lockstep.distributed import breakpoints

COMMAND = "lockstep local --config runs/a/config.yaml"


def no_pause() -> None:
    raise AssertionError("the debugger would open")


def stop(world: World) -> None:
    with breakpoints(world, COMMAND, no_pause):
        breakpoint()


def test_several_ranks_are_refused_with_the_command_for_one() -> None:
    hook = sys.breakpointhook
    with pytest.raises(RunError, match=rf"^breakpoint\(\) in {__file__}, line \d+: .* this one has 2; use: {COMMAND}$"):
        stop(World(1, 2, 1, 2))
    assert sys.breakpointhook is hook


def test_without_a_terminal_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        monkeypatch.setattr(sys, "breakpointhook", sys.__breakpointhook__)
        with pytest.raises(RunError, match=f"a terminal, which this process does not have; use: {COMMAND}"):
            stop(World())


def test_python_s_own_switch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONBREAKPOINT", "0")
    stop(World(0, 2, 0, 2))


class Stops(Dataset[int]):
    """Its only sample has a breakpoint."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        breakpoint()
        return index


def test_a_dataloader_worker_is_told_how_to_load_without_it() -> None:
    with pytest.raises(RunError) as failed, breakpoints(World(), COMMAND, no_pause):
        list(DataLoader(Stops(), num_workers=1, multiprocessing_context="fork"))
    assert failed.value.message.endswith("has no terminal; load the data without workers, as with num_workers=0.")
    assert failed.value.message.startswith(f"breakpoint() in {__file__}, line ")


def test_leaving_a_debugger_that_had_no_terminal_says_so() -> None:
    refused = pytest.raises(RunError, match=r"^pdb: a debugger needs a run with one rank, and this one has 2; use: ")
    with refused, breakpoints(World(0, 2, 0, 2), COMMAND, no_pause):
        raise BdbQuit
