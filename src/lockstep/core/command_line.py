"""Parse the flags of the launch scripts, and the folders of PYTHONPATH."""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from lockstep.core.errors import UsageError


class CommandLineParser(argparse.ArgumentParser):
    """An argparse parser that raises UsageError instead of printing its usage."""

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
