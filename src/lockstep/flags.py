"""The launchers' flags, and the environment in which they ask Slurm: a mistake in either is one sentence, as everywhere."""

import argparse
import os
from collections.abc import Mapping
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


def at_least(least: int) -> "type[int]":
    """A type of flags: a whole number of at least ``least``."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} must be {least} or more")
        return value

    number.__name__ = "int"
    return number  # type: ignore[return-value]


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
