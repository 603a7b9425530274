"""Config files and modules of a submission, as they were then. No torch here."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.core import UsageError, python_path
from lockstep.runs.snapshot import CodePaths, check_secrets

_FILE = re.compile(r"\.(ya?ml|json)$")


def freeze_config_files(arguments: Sequence[str], code: CodePaths, run: Path, secrets: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments with every config file in them replaced by its copy in the run folder ``run``."""
    frozen: list[str] = []
    follows = ""
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("--") else (follows, "", argument)
        may_be = name in ("--config", "--deepspeed.config") or (
            name.startswith("--") and "." not in name and _FILE.search(value)
        )
        is_file = may_be and Path(value).is_file()
        copy = str(_copy_config(Path(value), code, run / "configs", secrets)) if is_file else value
        frozen.append(f"{name}={copy}" if equals else copy if not argument.startswith("--") else argument)
        follows = argument if argument.startswith("--") and not equals else ""
    return tuple(frozen)


def _copy_config(path: Path, code: CodePaths, folder: Path, secrets: tuple[str, ...]) -> Path:
    if copy := code.inside(path):
        return copy
    folder.mkdir(exist_ok=True)
    copy = folder / f"{len(list(folder.iterdir()))}-{path.name}"
    content = path.read_bytes()
    check_secrets(path, content, secrets)
    copy.write_bytes(content)
    return copy


def config_files_of(point: Mapping[str, str]) -> list[str]:
    """Those of a point's arguments that name a config file."""
    return [f"--{key}={value}" for key, value in point.items() if _FILE.search(value) and Path(value).is_file()]


def check_not_ignored(config: Mapping[str, Any], code: CodePaths, here: Path, env: Mapping[str, str]) -> None:
    """Raise about a module of one's own that the config names and the snapshot lacks."""
    for name in sorted(_imported_packages(config)):
        for folder in (here, *python_path(env)):
            for path in (folder / name, folder / f"{name}.py"):
                is_there = path.is_dir() if not path.suffix else path.is_file()
                if is_there and path.resolve().is_relative_to(here) and code.inside(path) is None:
                    raise UsageError(
                        f"snapshot: {path} is needed, but git ignores it; take it out of .gitignore, or use --no-snapshot."
                    )


def _imported_packages(config: Any) -> set[str]:
    """First parts of the import paths of all classes in a config."""
    if isinstance(config, Mapping):
        path = config.get("class_path")
        inner = [_imported_packages(value) for value in config.values()]
        return set().union(*inner, {path.partition(".")[0]} if isinstance(path, str) and "." in path else set())
    return set().union(*map(_imported_packages, config)) if isinstance(config, list) else set()
