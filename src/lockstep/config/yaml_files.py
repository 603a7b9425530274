"""Read YAML as jsonargparse reads it, and write it so that it is read back unchanged."""

import re
from pathlib import Path
from typing import Any

import yaml

from lockstep.config.messages import expected_mapping
from lockstep.config.shipped import SHIPPED
from lockstep.core import UsageError, did_you_mean


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A YAML loader for which 1e-3 is a number and a date is a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
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


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that quotes a string such as 1e3, which ``_Loader`` would read as a number."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def load_yaml(text: str) -> Any:
    """Parse a YAML text; raise yaml.YAMLError if it is not valid YAML."""
    return yaml.load(text, _Loader)


def dump_yaml(content: Any) -> str:
    """Write YAML that ``load_yaml`` reads back unchanged."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_collection(value: Any) -> Any:
    """Return the list or mapping that a text contains as YAML; any other value unchanged."""
    try:
        loaded = load_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value
    return loaded if isinstance(loaded, dict | list) else value


def read_config_file(source: str, folder: Path = Path()) -> dict[Any, Any]:
    """Read the mapping in a config file.

    Args:
        source: Value of ``--config``: a path, or YAML itself.
        folder: Folder that a relative path starts from.

    Raises:
        UsageError: The file does not exist, cannot be read, or does not contain a mapping.
    """
    path = folder / source
    text = _read_text(path)
    try:
        content = load_yaml(source if text is None else text)
    except yaml.YAMLError as error:
        content = error
    if isinstance(content, dict):
        return content
    if text is None:
        names = [other.name for other in path.parent.glob("[!.]*.yaml")] + [shipped.stem for shipped in SHIPPED.glob("*.yaml")]
        raise UsageError(f"config: {source} does not exist{did_you_mean(path.name, names)}")
    if isinstance(content, yaml.YAMLError):
        raise UsageError(f"config: {source} is not valid YAML ({' '.join(str(content).split())}).")
    raise UsageError(expected_mapping(f"config: {source}", content))


def typed_text(source: str, folder: Path, name: str, value: object) -> str | None:
    """Text of the scalar named ``name`` in a config file that YAML 1.1 reads as ``value``: on, 1:00:00 or 010; None if none."""
    text = _read_text(folder / source)
    nodes = [yaml.compose(source if text is None else text, _Loader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            for key, item in node.value:
                found = item.value if isinstance(item, yaml.SequenceNode) else [item]
                named = str(key.value).rpartition(".")[2] == name
                for scalar in (node for node in found if named and isinstance(node, yaml.ScalarNode) and not node.style):
                    if load_yaml(scalar.value) == value and scalar.value.lower() != str(value).lower():
                        return str(scalar.value)
                nodes.append(item)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    return None


def _read_text(path: Path) -> str | None:
    """The text of a file; None if it does not exist."""
    try:
        if path.is_dir():
            raise UsageError(f"config: {path} is a folder, not a file.")
        return path.read_text() if path.is_file() else None
    except UnicodeDecodeError as error:
        raise UsageError(f"config: {path} is not valid YAML ({error}).") from None
    except PermissionError:
        raise UsageError(f"config: {path} cannot be read; its permissions do not allow it.") from None
    except OSError:  # YAML that is too long for a file name
        return None
