"""What was given, as flags and as config files, and the sentences about it. No torch is imported here."""

from collections.abc import Iterable, Sequence

from lockstep.config.schema import COMMANDS, RESERVED_TRAINER_KEYS
from lockstep.core import did_you_mean


def not_a_flag(argument: str) -> str:
    """About an argument that is neither a key nor the value of one."""
    return f"{argument!r} is no key: keys begin with --, a command ({', '.join(COMMANDS)}) stands before them."


def missing_value(key: str) -> str:
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
    if first == "trainer" and rest in RESERVED_TRAINER_KEYS:
        return f"{key}{given}: is not for a config; {RESERVED_TRAINER_KEYS[rest]}."
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


def missing_key(key: str, owner: str = "") -> str:
    """About a key without which nothing can be made: ``owner`` is the class that needs it, else the config itself."""
    if owner:
        return f"{key}: must be set; {owner} needs it."
    return f"{key}: must be set; a --config file usually does it, such as configs/digits.yaml."


def expected_mapping(key: str, value: object) -> str:
    """About a value that must be a mapping and is none."""
    return f"{key}: must hold keys with values; it holds {'nothing' if value is None else repr(value)}."


def invalid_key_type(key: str, name: object) -> str:
    """About a name in a mapping, such as a number, that YAML takes for something else than a text."""
    return f"{key}: {name!r} cannot be the name of a key."


def class_not_set(key: str, inner: str, value: object) -> str:
    """About ``inner``, an argument of the class that ``key`` does not name yet."""
    return f"{inner} (value {value}): the class is not known yet; set {key} before its arguments."


def unknown_class_name(key: str, name: str, valid: Iterable[str]) -> str:
    """About the name of a class without its module, which no known class has."""
    return f"{key}: there is no class {name!r}{did_you_mean(name, valid)}"


def missing_module(key: str, path: str, problem: str) -> str:
    """About an import path whose module is not there."""
    return f"{key}: {path} does not exist ({problem}); run from the folder that holds your module."


def missing_class(key: str, path: str, valid: Iterable[str]) -> str:
    """About an import path whose module is there, but has no such class; ``valid`` are those that it has."""
    return f"{key}: {path} does not exist{did_you_mean(path, valid)}"


def wrong_base_class(key: str, path: str, base: str) -> str:
    """About a class that is there but cannot stand where it is named."""
    return f"{key}: {path} is no {base}."
