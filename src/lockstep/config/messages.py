"""Error messages about a config: one sentence with the key, its value, the cause and the remedy."""

from collections.abc import Sequence

from lockstep.config.schema import RESERVED_TRAINER_KEYS
from lockstep.core import did_you_mean


def unknown_key(key: str, value: object, valid: Sequence[str], owner: str = "") -> str:
    """Message about a key that does not exist, or is not an argument of the class ``owner``; an empty value is left out."""
    given = f" (value {value})" if value != "" else ""
    first, _, rest = key.partition(".")
    if first == "trainer" and rest in RESERVED_TRAINER_KEYS:
        return f"{key}{given}: cannot be set in a config; {RESERVED_TRAINER_KEYS[rest]}."
    if owner:
        return f"{key}{given}: unknown argument of {owner}{did_you_mean(key, valid)}"
    groups = {name.partition(".")[0] for name in valid}
    if rest and first not in groups:
        return f"{key}{given}: unknown key{did_you_mean(first, groups, rest)}"
    return f"{key}{given}: unknown key{did_you_mean(key, valid)}"


def wrong_value(key: str, value: object, expected: Sequence[str], choices: Sequence[str] = (), typed: str | None = None) -> str:
    """Message about a value of another type than the ``expected`` ones.

    Args:
        choices: The valid words, if any.
        typed: What a file has, if YAML reads that as another ``value``.
    """
    hint = did_you_mean(str(value if typed is None else typed), choices) if choices else "."
    if typed is None:
        return f"{key}: {str(value)!r} is not valid: expected {' or '.join(expected)}{hint}"
    if "str" in expected or typed in choices:
        hint = "; put it in quotes."
    return f"{key}: {typed!r}, which YAML reads as {value!r}, is not valid: expected {' or '.join(expected)}{hint}"


def missing_key(key: str, owner: str = "") -> str:
    """Message about a key that is not set; the class ``owner`` requires it, or every config."""
    if owner:
        return f"{key}: must be set; {owner} requires it."
    return f"{key}: must be set, usually in a --config file such as configs/digits.yaml."


def expected_mapping(key: str, value: object) -> str:
    """Message about a value that must be a mapping."""
    return f"{key}: expected a mapping, got {'null' if value is None else repr(value)}."


def invalid_key_type(key: str, name: object) -> str:
    """Message about a ``name`` in a mapping that YAML does not read as a string, such as a number."""
    return f"{key}: the name {name!r} must be a string; put it in quotes."


def class_not_set(key: str, inner: str, value: object) -> str:
    """Message about ``inner``, an argument of the class that ``key`` does not name yet."""
    return f"{inner} (value {value}): the class is not known yet; set {key} before its arguments."
