"""Copies of the config files of a submission, and the check that its modules are in the snapshot."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.core import UsageError, python_path
from lockstep.runs.snapshot import CodePaths, check_secrets

_CONFIG_FILE = re.compile(r"\.(ya?ml|json)$")


def freeze_config_files(arguments: Sequence[str], code: CodePaths, run: Path, secrets: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``arguments`` with each config file replaced by its copy: in the snapshot, else in ``run/configs``.

    Raises:
        UsageError: A file contains one of ``secrets``.
    """
    frozen: list[str] = []
    flag = ""  # the one before, where its value is an argument of its own
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("--") else (flag, "", argument)
        takes_file = name in ("--config", "--deepspeed.config") or (
            name.startswith("--") and "." not in name and _CONFIG_FILE.search(value)
        )
        if takes_file and Path(value).is_file():
            copy = str(code.inside(Path(value)) or _copy_config(Path(value), run / "configs", secrets))
            frozen.append(f"{name}={copy}" if equals else copy)
        else:
            frozen.append(argument)
        flag = argument if argument.startswith("--") and not equals else ""
    return tuple(frozen)


def _copy_config(path: Path, folder: Path, secrets: tuple[str, ...]) -> Path:
    folder.mkdir(exist_ok=True)
    copy = folder / f"{len(list(folder.iterdir()))}-{path.name}"
    content = path.read_bytes()
    check_secrets(path, content, secrets)
    copy.write_bytes(content)
    return copy


def config_file_arguments(point: Mapping[str, str]) -> list[str]:
    """The arguments of a sweep point that name a config file."""
    return [f"--{key}={value}" for key, value in point.items() if _CONFIG_FILE.search(value) and Path(value).is_file()]


def check_not_ignored(config: Mapping[str, Any], code: CodePaths, here: Path, env: Mapping[str, str]) -> None:
    """Raise UsageError if a module of the config lies in the folder of submission, but git ignores it."""
    for name in sorted(_imported_packages(config)):
        for folder in (here, *python_path(env)):
            for path in (folder / name, folder / f"{name}.py"):
                exists = path.is_file() if path.suffix else path.is_dir()
                if exists and path.resolve().is_relative_to(here) and code.inside(path) is None:
                    raise UsageError(
                        f"snapshot: {path} is needed, but git ignores it; remove it from .gitignore, or use --no-snapshot."
                    )


def _imported_packages(config: Any) -> set[str]:
    """Top-level packages of all classes in a config."""
    if isinstance(config, Mapping):
        path = config.get("class_path")
        inner = [_imported_packages(value) for value in config.values()]
        return set().union(*inner, {path.partition(".")[0]} if isinstance(path, str) and "." in path else set())
    return set().union(*map(_imported_packages, config)) if isinstance(config, list) else set()
