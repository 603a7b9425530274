"""Parse the flags of the launch scripts and the folders of PYTHONPATH, and build shell commands for messages."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from lockstep.core.errors import UsageError


class CommandLineParser(argparse.ArgumentParser):
    """An argparse parser that raises UsageError instead of printing its usage, and expands ``~`` in arguments of type Path."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, lambda text: Path(text).expanduser())

    def error(self, message: str) -> NoReturn:
        dashes = any(f"{flag}: expected one" in message for flag in ("sbatch", "srun"))
        hint = "; write it with =, such as --sbatch=--hold" if dashes else ""
        raise UsageError(f"{message}{hint}; --help lists the flags.")


def int_at_least(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: an integer of ``minimum`` or more."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} must be {minimum} or more")
        return value

    parse.__name__ = "int"  # for argparse's own message
    return parse


def python_path(env: Mapping[str, str]) -> list[Path]:
    """The folders of PYTHONPATH."""
    return [Path(entry) for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]


_SCRIPTS = {"local": "local.py", "submit": "slurm.py", "jobs": "jobs.py"}
"""The script in ``launch/`` for each command of ``lockstep``."""


def shell_command(command: str, *arguments: object) -> str:
    """Build a command of lockstep to paste into a shell: quoted, with the program that the user typed to start this process.

    If no user started it, as in a job, the program is ``lockstep`` or ``python -m lockstep.cli`` of this Python.
    """
    script = Path(sys.argv[0])
    if script.name in _SCRIPTS.values() and command in _SCRIPTS:
        words = [python_command(), str(script.with_name(_SCRIPTS[command]))]
    elif script.name == "lockstep" and script.is_file():
        words = [_name_or_path(script), command]
    elif script.name not in (*_SCRIPTS.values(), "__main__.py") and is_on_path("lockstep"):
        words = ["lockstep", command]
    else:
        words = [python_command(), "-m", "lockstep.cli", command]
    return shlex.join([*words, *map(str, arguments)])


def python_command() -> str:
    """The shortest command that starts this Python."""
    python = Path(sys.executable)
    return next((name for name in ("python", "python3") if _found(name) == python), None) or _name_or_path(python)


def is_on_path(name: str) -> bool:
    """Whether the shell finds the program ``name`` of this Python's environment."""
    return _found(name) == Path(sys.executable).with_name(name)


def _found(name: str) -> Path | None:
    found = shutil.which(name)
    return None if found is None else Path(os.path.abspath(found))


def _name_or_path(program: Path) -> str:
    """The name of ``program`` if it is on the PATH, else its path, relative if it is below the current folder."""
    path = Path(os.path.abspath(program))
    if _found(path.name) == path:
        return path.name
    return str(path.relative_to(here)) if path.is_relative_to(here := Path.cwd()) else str(path)
