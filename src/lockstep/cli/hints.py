"""What was meant by arguments that a launcher refuses: a flag of the other launcher, or a profile instead of a config."""

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

from lockstep.config import SHIPPED, read_config_file
from lockstep.core import UsageError

_OF_BOTH = {"ranks": "ranks-per-node", "ranks-per-node": "ranks"}
"""Flags of one launcher for which the other has one of another name."""


def check_misplaced(arguments: Sequence[str], flags: Collection[str], other: Callable[[str], argparse.ArgumentParser]) -> None:
    """Raise UsageError if an argument belongs elsewhere; to be called where arguments were refused, because it takes long.

    Args:
        arguments: Those that are not flags of this launcher.
        flags: Its flags, without dashes.
        other: Builds the parser of the other launcher, from the name of its program.
    """
    program = "lockstep local" if "nodes" in flags and "profile" in flags else "lockstep submit"
    others = {name.replace("_", "-") for name in vars(other(program).parse_args([]))} - set(flags)
    for argument in arguments:
        flag = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and flag in others:
            instead = f"use --{_OF_BOTH[flag]} here" if flag in _OF_BOTH else "leave it out here"
            raise UsageError(f"--{flag}: is a flag of {program}; {instead}.")
    for source in _config_files(arguments):
        if _is_profile(source):
            use = f"--profile {source if Path(source).exists() else Path(source).stem}"
            raise UsageError(f"config: {source} is a profile, which describes a cluster; give it to lockstep submit by {use}.")


def _config_files(arguments: Sequence[str]) -> Iterator[str]:
    yield from (second for first, second in pairwise(arguments) if first == "--config")
    yield from (argument.partition("=")[2] for argument in arguments if argument.startswith("--config="))


def _is_profile(source: str) -> bool:
    """Whether a file has keys of a profile only, or, if it does not exist, has the name of a shipped profile."""
    if not Path(source).exists():
        return (SHIPPED / "cluster" / f"{Path(source).stem}.yaml").exists()
    from lockstep.slurm.submission import Profile  # imports submitit, which a local run does not need

    try:
        keys = read_config_file(source).keys()
    except UsageError:
        return False
    return bool(keys) and keys <= {field.name for field in fields(Profile)}
