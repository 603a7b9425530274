"""What was given, as flags and as config files, and the sentences about it. No torch is imported here."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lockstep.core import UsageError, did_you_mean


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads YAML as jsonargparse does: 1e-3 is a number, and a date is a text."""


_RESOLVERS = yaml.SafeLoader.yaml_implicit_resolvers.items()


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("float", "timestamp")]
    for first, resolvers in _RESOLVERS
}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
        r"|\.[0-9_]+(?:[eE][-+][0-9]+)?$|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: It is none.
    """
    return yaml.load(text, _Loader)


def parse_collection(value: Any) -> Any:
    """The list or mapping that a text stands for; any other value as it is."""
    try:
        loaded = load_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value
    return loaded if isinstance(loaded, dict | list) else value


def read_config_file(given: str, folder: Path = Path()) -> dict[Any, Any]:
    """The keys and values of a config file, or of a YAML text in its place.

    Args:
        given: What ``--config`` says.
        folder: Where a relative path begins.

    Raises:
        UsageError: There is no such file, or it holds no keys.
    """
    path = folder / given
    text = _read_text(path)
    try:
        content = load_yaml(given if text is None else text)
    except yaml.YAMLError as error:
        content = error
    if isinstance(content, dict):
        return content
    if text is None:
        near = did_you_mean(path.name, (other.name for other in path.parent.glob("*.yaml")))
        raise UsageError(f"config: there is no file {given}{near}")
    if isinstance(content, yaml.YAMLError):
        raise UsageError(f"config: {given} is no valid YAML ({' '.join(str(content).split())}).")
    holds = "nothing" if content is None else repr(content)
    raise UsageError(f"config: {given} must hold keys with values; it holds {holds}.")


def _read_text(path: Path) -> str | None:
    """What a file holds; None where there is no such file."""
    try:
        if path.is_dir():
            raise UsageError(f"config: {path} is a folder, not a file.")
        return path.read_text() if path.is_file() else None
    except UnicodeDecodeError as error:
        raise UsageError(f"config: {path} is no valid YAML ({error}).") from None
    except PermissionError:
        raise UsageError(f"config: {path} cannot be read; its permissions do not allow it.") from None
    except OSError:  # a text that is too long for a name
        return None


def config_files(arguments: Sequence[str]) -> list[str]:
    """What ``--config`` was given, each time."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=False)
    return [b if a == "--config" else a[9:] for a, b in pairs if a == "--config" or a.startswith("--config=")]
