"""Shipped configs, which ``--config`` finds by name; ``files`` is the folder ``configs`` of the repository."""

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

SHIPPED = Path(__file__).resolve().parent / "files"

DEFAULT = "digits"


def with_config(arguments: Sequence[str], resumed: str | None = None) -> list[str]:
    """What ``find_shipped`` returns, with the config of a ``resumed`` run; without that and any other, with the default one."""
    found = find_shipped(arguments)
    if resumed is None and any(argument == "--config" or argument.startswith("--config=") for argument in found):
        return found
    at = 1 if found and not found[0].startswith("-") else 0
    return [*found[:at], "--config", resumed or str(_shipped(DEFAULT)), *found[at:]]


def find_shipped(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with paths for the names of shipped configs; a file of that name comes first."""
    found, is_value = list[str](), False
    for argument in arguments:
        name = argument if is_value else argument.removeprefix("--config=")
        if (is_value or name != argument) and (path := _shipped(name)) is not None:
            argument = str(path) if is_value else f"--config={path}"
        is_value = argument == "--config" and not is_value
        found.append(argument)
    return found


def _shipped(name: str) -> Path | None:
    path = SHIPPED / f"{name}.yaml"
    return path.resolve() if name.replace("_", "").isalnum() and path.is_file() and not Path(name).exists() else None


def describe_files(folder: Path = SHIPPED) -> dict[str, str]:
    """The YAML files of a folder by name, each with the first sentence of its comment."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        lines = path.read_text().splitlines()
        comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
        found[path.stem] = re.split(r"(?<=\.) (?=[A-Z`])", comment)[0]
    return found
