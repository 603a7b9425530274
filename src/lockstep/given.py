"""What was given, as flags and as config files, and the sentences about it. No torch is imported here."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lockstep.errors import UsageError
from lockstep.nearest import did_you_mean
from lockstep.options import COMMANDS, OWNED


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


def load(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: It is none.
    """
    return yaml.load(text, _Loader)


def structured(value: Any) -> Any:
    """The list or mapping that a text stands for; any other value as it is."""
    try:
        loaded = load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value
    return loaded if isinstance(loaded, dict | list) else value


def read_config(given: str, folder: Path = Path()) -> dict[Any, Any]:
    """The keys and values of a config file, or of a YAML text in its place.

    Args:
        given: What ``--config`` says.
        folder: Where a relative path begins.

    Raises:
        UsageError: There is no such file, or it holds no keys.
    """
    path = folder / given
    text = _text_of(path)
    try:
        content = load(given if text is None else text)
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


def _text_of(path: Path) -> str | None:
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


def flags(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Each key, without its dashes, and its value, in their order.

    Raises:
        UsageError: Something is no key, or a key has no value.
    """
    found, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "-h":
            argument = "--help"
        if not _is_flag(argument) or argument == "--":
            raise UsageError(not_a_key(argument))
        key, equals, value = argument[2:].partition("=")
        alone = not rest or _is_flag(rest[0]) or re.fullmatch(r"-[a-zA-Z]\S*", rest[0]) is not None
        if not equals and key != "help":
            if not alone:
                value = rest.pop(0)
            elif key != "print_config" and not key.endswith(".help"):
                raise UsageError(needs_a_value(key))
        found.append((key, value))
    return found


def _is_flag(argument: str) -> bool:
    return argument.startswith("--") and " " not in argument.partition("=")[0]


def not_a_key(argument: str) -> str:
    """About an argument that is neither a key nor the value of one."""
    return f"{argument!r} is no key: keys begin with --, a command ({', '.join(COMMANDS)}) stands before them."


def needs_a_value(key: str) -> str:
    """About a key that nothing follows."""
    return f"{key}: needs a value: --{key} VALUE."


def unknown_key(key: str, value: object, valid: Iterable[str], owner: str = "") -> str:
    """About a key that does not exist, with the nearest ones.

    Args:
        key: The key, dotted.
        value: Its value; the sentence leaves an empty text out.
        valid: Keys that exist.
        owner: The class that the key belongs to, if any.
    """
    given = f" (value {value})" if value != "" else ""
    first, _, rest = key.partition(".")
    if first == "trainer" and rest in OWNED:
        return f"{key}{given}: is not for a config; {OWNED[rest]}."
    valid = list(valid)
    groups = {name.partition(".")[0] for name in valid}
    if not owner and rest and first not in groups:
        return f"{key}{given}: there is no such key{did_you_mean(first, groups, rest)}"
    where = f" of {owner}" if owner else ""
    return f"{key}{given}: there is no such key{where}{did_you_mean(key, valid)}"


def wrong_value(key: str, value: object, expected: Iterable[str], choices: Sequence[str] = ()) -> str:
    """About a value of the wrong type: ``expected`` names the right ones, ``choices`` are the words that are valid."""
    hint = did_you_mean(str(value), choices) if choices else "."
    return f"{key}: {str(value)!r} is not valid: expected {' or '.join(expected)}{hint}"


def must_be_set(key: str, owner: str = "") -> str:
    """About a key without which nothing can be made: ``owner`` is the class that needs it, else the config itself."""
    if owner:
        return f"{key}: must be set; {owner} needs it."
    return f"{key}: must be set; a --config file usually does it, such as configs/digits.yaml."


def no_mapping(key: str, value: object) -> str:
    """About a value that must be a mapping and is none."""
    return f"{key}: must hold keys with values; it holds {'nothing' if value is None else repr(value)}."


def no_text(key: str, name: object) -> str:
    """About a name in a mapping, such as a number, that YAML takes for something else than a text."""
    return f"{key}: {name!r} cannot be the name of a key."


def class_first(key: str, inner: str, value: object) -> str:
    """About ``inner``, an argument of the class that ``key`` does not name yet."""
    return f"{inner} (value {value}): the class is not known yet; set {key} before its arguments."


def no_class(key: str, name: str, valid: Iterable[str]) -> str:
    """About the name of a class without its module, which no known class has."""
    return f"{key}: there is no class {name!r}{did_you_mean(name, valid)}"


def no_module(key: str, path: str, problem: str) -> str:
    """About an import path whose module is not there."""
    return f"{key}: {path} does not exist ({problem}); run from the folder that holds your module."


def not_in_module(key: str, path: str, valid: Iterable[str]) -> str:
    """About an import path whose module is there, but has no such class; ``valid`` are those that it has."""
    return f"{key}: {path} does not exist{did_you_mean(path, valid)}"


def wrong_class(key: str, path: str, base: str) -> str:
    """About a class that is there but cannot stand where it is named."""
    return f"{key}: {path} is no {base}."
