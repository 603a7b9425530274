"""Copies of the config files of a submission, and the check that its modules are in the snapshot."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.core import UsageError, python_path
from lockstep.runs.snapshot import CodePaths, check_secrets


@dataclass(frozen=True)
class ConfigFreezer:
    """Replace the config files in arguments with copies: those in the snapshot ``code``, else new ones in ``folder``."""

    code: CodePaths
    folder: Path
    secrets: tuple[str, ...]
    _copies: dict[str, Path] = field(default_factory=dict, init=False)

    def freeze(self, arguments: Sequence[str]) -> tuple[str, ...]:
        """Return ``arguments`` with the path of each config file replaced; raise UsageError if one contains a secret."""
        frozen: list[str] = []
        flag = ""  # the argument before, if it is a flag without a value
        for argument in arguments:
            name, equals, value = argument.partition("=") if argument.startswith("--") else (flag, "", argument)
            takes_file = name in ("--config", "--deepspeed.config") or (
                name.startswith("--") and "." not in name and re.search(r"\.(ya?ml|json)$", value)
            )
            value = os.path.expanduser(value)
            if takes_file and Path(value).is_file():
                argument = f"{name}={self._copy(value)}" if equals else str(self._copy(value))
            frozen.append(argument)
            flag = argument if argument.startswith("--") and not equals else ""
        return tuple(frozen)

    def _copy(self, name: str) -> Path:
        if copy := self._copies.get(name) or self.code.inside(Path(name)):
            return copy
        content = Path(name).read_bytes()
        check_secrets(name, content, self.secrets)
        self.folder.mkdir(exist_ok=True)
        copy = self._copies[name] = self.folder / f"{len(self._copies)}-{Path(name).name}"
        copy.write_bytes(content)
        return copy


def check_not_ignored(config: Mapping[str, Any], code: CodePaths, here: Path, env: Mapping[str, str]) -> None:
    """Raise UsageError if a module of the config lies in the folder of submission, but git ignores it."""
    for name in sorted(_imported_packages(config)):
        for path in (folder / part for folder in (here, *python_path(env)) for part in (name, f"{name}.py")):
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
