"""Validate arguments and write config files."""

from pathlib import Path

from lockstep.config.validation import validate_arguments
from lockstep.core import UsageError
from support.runs import REPO

DIGITS = ("--config", str(REPO / "configs/digits.yaml"))


def said(arguments: list[str], *folders: Path) -> str:
    """The error message about ``arguments``; empty if they are valid."""
    try:
        validate_arguments(arguments, ["nodes", "ranks"], folders)
    except UsageError as error:
        return error.message
    return ""


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    """Write a file in ``folder`` and return its path."""
    (folder / name).write_text(text)
    return str(folder / name)
