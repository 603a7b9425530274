"""Validate arguments, and write config files."""

from pathlib import Path

from jsonargparse import ArgumentError

from lockstep.config.validation import validate_arguments
from lockstep.core import UsageError
from lockstep.trainer.config_parser import make_parser
from support.runs import REPO

DIGITS = ("--config", str(REPO / "configs/digits.yaml"))


def said(arguments: list[str], *folders: Path) -> str:
    """The error message for ``arguments``; empty if they are valid."""
    try:
        validate_arguments(arguments, ["nodes", "ranks"], folders)
    except UsageError as error:
        return error.message
    return ""


def parses(arguments: list[str]) -> bool:
    """Whether jsonargparse, without static validation, accepts ``arguments``."""
    try:
        make_parser().parse_args(arguments)
    except ArgumentError:
        return False
    return True


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    """Write a config file into ``folder`` and return its path."""
    (folder / name).write_text(text)
    return str(folder / name)
