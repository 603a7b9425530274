"""Commands that lockstep prints are those that the person has, and can be pasted."""

import shlex
import sys
from pathlib import Path

import pytest

from lockstep.core import shell_command


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder ``bin`` of an environment with Python, below this folder; it is not on the PATH."""
    programs = tmp_path / "my env" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "lockstep"):
        (programs / name).write_text("")
        (programs / name).chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    return programs


@pytest.mark.parametrize(
    ("typed", "command", "printed"),
    [
        ("launch/slurm.py", "jobs", "PYTHON launch/jobs.py"),
        ("../a b/launch/local.py", "local", "PYTHON '../a b/launch/local.py'"),
        ("launch/local.py", "sync", "PYTHON -m lockstep.cli sync"),
        ("my env/bin/lockstep", "sync", "LOCKSTEP sync"),
        ("/x/lockstep/cli/__main__.py", "local", "PYTHON -m lockstep.cli local"),
        ("/x/submitit/core/_submit.py", "sync", "FOUND sync"),
    ],
)
@pytest.mark.parametrize("activated", [False, True])
def test_the_program_that_was_typed(
    environment: Path, monkeypatch: pytest.MonkeyPatch, typed: str, command: str, printed: str, activated: bool
) -> None:
    monkeypatch.setattr(sys, "argv", [typed])
    if activated:
        monkeypatch.setenv("PATH", str(environment))
    python, lockstep = ("python", "lockstep") if activated else ("'my env/bin/python'", "'my env/bin/lockstep'")
    found = "lockstep" if activated else f"{python} -m lockstep.cli"
    printed = printed.replace("PYTHON", python).replace("LOCKSTEP", lockstep).replace("FOUND", found)
    assert shell_command(command) == printed
    assert shlex.split(shell_command(command, Path("my runs/$1"))) == [*shlex.split(printed), "my runs/$1"]
