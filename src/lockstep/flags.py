"""The launchers' flags, and the environment in which they ask Slurm: a mistake in either is one sentence, as everywhere."""

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lockstep.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse's, which raises UsageError instead of printing its whole usage."""

    def error(self, message: str) -> NoReturn:
        hint = (
            "; write it with =, such as --sbatch=--hold"
            if "sbatch: expected one" in message or "srun: expected one" in message
            else ""
        )
        raise UsageError(f"{message}{hint}; --help lists the flags.")


@dataclass(frozen=True)
class Nodes:
    """How many nodes a job takes: a number, or a range of which each start of the job gets what there is.

    Attributes:
        least, most: Of the range.
    """

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}-{self.most}"

    @classmethod
    def parse(cls, text: str) -> "Nodes":
        """``4``, or ``2-4``."""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of nodes; write 4, or 2-4")
        nodes = cls(int(match[1]), int(match[2] or match[1]))
        if not 1 <= nodes.least <= nodes.most:
            raise argparse.ArgumentTypeError(f"{text} must be 1 or more, the smaller number first")
        return nodes


def at_least(least: int) -> Callable[[str], int]:
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


def refuse_dead_conf(env: Mapping[str, str]) -> None:
    """Raise UsageError where SLURM_CONF leads nowhere: each of Slurm's commands would try for a minute before it says so."""
    conf = env.get("SLURM_CONF")
    if conf and not (Path(conf).is_file() and os.access(conf, os.R_OK)):
        raise UsageError(f"SLURM_CONF={conf} is no file that can be read: that cluster is gone; unset SLURM_CONF.")


def asking(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` without the defaults of a user's own, such as SQUEUE_PARTITION, which would leave jobs or partitions out."""
    return {
        name: value for name, value in env.items() if not name.startswith(("SQUEUE_", "SACCT_", "SINFO_", "SLURM_CLUSTERS"))
    }
