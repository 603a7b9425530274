"""Explain arguments that a launcher refuses: a flag of the other launcher, or a profile instead of a config."""

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from lockstep.config import SHIPPED, Options, read_config_file
from lockstep.core import UsageError

_COUNTERPARTS = {"ranks": "ranks-per-node", "ranks-per-node": "ranks"}
"""Flags that the other launcher has under another name."""


def check_misplaced(arguments: Sequence[str], flags: Collection[str], other: Callable[[str], argparse.ArgumentParser]) -> None:
    """Raise UsageError if an argument belongs elsewhere. It is slow: call it only after arguments were refused.

    Args:
        arguments: Those that are not flags of this launcher.
        flags: Its flags, without dashes.
        other: Builds the parser of the other launcher, from the name of its program.
    """
    program = "lockstep local" if "profile" in flags else "lockstep submit"
    others = {name.replace("_", "-") for name in vars(other(program).parse_args([]))} - set(flags)
    for argument in arguments:
        flag = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and flag in others:
            instead = f"use --{_COUNTERPARTS[flag]} here" if flag in _COUNTERPARTS else "leave it out here"
            raise UsageError(f"--{flag}: is a flag of {program}; {instead}.")
    for source in _config_files(arguments):
        if not (content := _content(source)) and Path(source).exists():
            continue
        if _is_profile(source, content):
            use = f"--profile {source if Path(source).exists() else Path(source).stem}"
            raise UsageError(
                f"config: {source} is a profile, which describes a cluster; give it to lockstep submit with {use}."
            )
        # It may not be the mistake that was reported, but it is one.
        for key in sorted(key for key in content if isinstance(key, str) and key not in _CONFIG_KEYS):
            flag, place = key.replace("_", "-"), f"{key} (value {content[key]}): in {source}, "
            has_flag = flag in others or flag in flags
            if key in _profile_keys():
                instead = f", or use --{flag} of lockstep submit" if has_flag else ""
                raise UsageError(f"{place}belongs in a profile, which describes a cluster; move it there{instead}.")
            if has_flag:
                of = f" of {program}" if flag in others else ""
                raise UsageError(f"{place}is a flag and not a key of a config; remove it, and use --{flag}{of}.")


_CONFIG_KEYS = {field.name for field in fields(Options)}


def _config_files(arguments: Sequence[str]) -> Iterator[str]:
    yield from (second for first, second in pairwise(arguments) if first == "--config")
    yield from (argument.partition("=")[2] for argument in arguments if argument.startswith("--config="))


def _content(source: str) -> dict[Any, Any]:
    """The content of a config file, or of YAML in its place; empty if it cannot be read."""
    try:
        return read_config_file(source)
    except UsageError:
        return {}


def _is_profile(source: str, content: Mapping[Any, Any]) -> bool:
    """Whether a file has only keys of a profile. A file that does not exist counts if it has the name of a shipped profile."""
    if not content:
        return (SHIPPED / "cluster" / f"{Path(source).stem}.yaml").exists()
    return content.keys() <= _profile_keys()


def _profile_keys() -> set[str]:
    from lockstep.slurm.submission import Profile  # imports submitit, which a local run does not need

    return {field.name for field in fields(Profile)}
