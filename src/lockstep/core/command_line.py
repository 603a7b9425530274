"""The launchers' flags, and the environment in which they ask Slurm: a mistake in either is one sentence, as everywhere."""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from lockstep.core.errors import UsageError


class CommandLineParser(argparse.ArgumentParser):
    """argparse's, which raises UsageError instead of printing its whole usage."""

    def error(self, message: str) -> NoReturn:
        hint = (
            "; write it with =, such as --sbatch=--hold"
            if "sbatch: expected one" in message or "srun: expected one" in message
            else ""
        )
        raise UsageError(f"{message}{hint}; --help lists the flags.")


def int_at_least(least: int) -> Callable[[str], int]:
    """A type of flags: a whole number of at least ``least``."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} must be {least} or more")
        return value

    number.__name__ = "int"
    return number


def python_path(env: Mapping[str, str]) -> list[Path]:
    """The folders of PYTHONPATH."""
    return [Path(entry) for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
