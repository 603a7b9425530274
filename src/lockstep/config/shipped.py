"""Shipped configs, which ``--config`` finds by name; ``files`` is the folder ``configs`` of the repository."""

import os
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from lockstep.config.schema import COMMANDS
from lockstep.core import UsageError

SHIPPED = Path(__file__).resolve().parent / "files"

DEFAULT = "digits"


def with_config(
    arguments: Sequence[str],
    resumed: str | None = None,
    default: str | None = DEFAULT,
    checkpoints: Sequence[str] = (),
) -> list[str]:
    """Resolve the names of shipped configs as ``find_shipped`` does, and add a config if ``arguments`` have none.

    Args:
        resumed: The config of the run to resume; it precedes all others.
        default: The shipped config to add if no run has one; None adds none.
        checkpoints: The checkpoints of a sweep, for ``arguments`` without ``--ckpt_path``.

    Raises:
        UsageError: The checkpoint to evaluate is not in a run folder, or the checkpoints belong to different runs.
    """
    found = find_shipped(arguments)
    if resumed is None and any(argument == "--config" or argument.startswith("--config=") for argument in found):
        return found
    at = 1 if found and not found[0].startswith("-") else 0
    is_evaluation = at == 1 and found[0] in COMMANDS and found[0] != "fit"
    config = resumed or (_config_of_run(found, checkpoints) if is_evaluation else None) or (default and _shipped(default))
    return [*found[:at], "--config", str(config), *found[at:]] if config else found


def run_config(place: Path) -> Path | None:
    """``config.yaml`` of the run at ``place``, a run folder or a checkpoint in one; None if it is neither."""
    found = re.fullmatch(r"(.+)/checkpoints/step-[^/]+(/[^/]+)?", str(place.absolute()))
    config = (Path(found[1]) if found else place.absolute()) / "config.yaml"
    return config if config.is_file() else None


def _config_of_run(arguments: Sequence[str], swept: Sequence[str]) -> Path | None:
    """The config of the run to evaluate; None if no checkpoint exists, or ``arguments`` set the model."""
    given, flag = list(swept), ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if flag == "--ckpt_path" or (equals and name == "--ckpt_path"):
            given = [argument if flag == "--ckpt_path" else value]
        flag = argument
    places = [place for place in (Path(text).expanduser() for text in given) if os.path.exists(place)]
    configs = {run_config(place) for place in places}
    if len(configs) > 1:
        raise UsageError("ckpt_path: the checkpoints belong to different runs; set their config with --config.")
    config = next(iter(configs), None)
    if places and config is None and not any(re.match(r"--model(=|$)", argument) for argument in arguments):
        raise UsageError(f"ckpt_path: {places[0]} is not in a run folder, so its config is not known; set one with --config.")
    return config


def find_shipped(arguments: Sequence[str]) -> list[str]:
    """Replace names of shipped configs by their paths, unless a file has the name, and expand ``~/mine.yaml``."""
    found, is_value = list[str](), False
    for argument in arguments:
        prefix = "" if is_value else "--config="
        name = argument.removeprefix(prefix)
        path = _shipped(name) or (Path(name).expanduser() if name.startswith("~/") else None)
        if argument.startswith(prefix) and path is not None:
            argument = f"{prefix}{path}"
        is_value = argument == "--config" and not is_value
        found.append(argument)
    return found


def _shipped(name: str) -> Path | None:
    path = SHIPPED / f"{name}.yaml"
    # The functions of os.path are false for a name that is too long; those of Path raise OSError.
    return path.resolve() if name.replace("_", "").isalnum() and os.path.isfile(path) and not os.path.exists(name) else None


def describe_files(folder: Path = SHIPPED) -> dict[str, str]:
    """The YAML files of a folder by name, each with the first sentence of its comment."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        lines = path.read_text().splitlines()
        comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
        found[path.stem] = re.split(r"(?<=\.) (?=[A-Z`])", comment)[0]
    return found
