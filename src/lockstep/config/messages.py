"""Error messages about a config: one sentence with the key, its value, the cause and the remedy."""

from collections.abc import Sequence
from difflib import get_close_matches

from lockstep.config.schema import RESERVED_TRAINER_KEYS
from lockstep.core import did_you_mean

_OTHER_NAMES = {
    "learning_rate": "lr", "max_lr": "lr", "epochs": "max_epochs", "num_epochs": "max_epochs", "steps": "max_steps",
    "batch": "batch_size", "bs": "batch_size", "workers": "num_workers", "seed": "seed_everything", "wd": "weight_decay",
    "output_dir": "run.root", "log_dir": "run.root", "checkpoint": "ckpt_path", "resume_from_checkpoint": "ckpt_path",
    "loss": "criterion", "scheduler": "schedule", "gradient_accumulation_steps": "accumulate_grad_batches",
    "max_grad_norm": "gradient_clip_val", "project": "wandb.project",
}  # fmt: skip
"""Names that other programs use for the last part of a key, and our names."""


def suggest_key(key: str, valid: Sequence[str]) -> str:
    """End a sentence about an unknown ``key``: suggest valid keys, as ``did_you_mean`` does."""
    last = key.rpartition(".")[2]
    wanted = _OTHER_NAMES.get(last.lower(), last)
    if same := sorted({name for name in valid if name == wanted or name.endswith(f".{wanted}")}):
        return f"; did you mean {' or '.join(map(repr, same[:3]))}?"
    # The name of the group alone makes its keys alike, such as data.root and data.drop_last.
    group = key[: -len(last)]
    alike = [name for name in valid if not name.startswith(group) or get_close_matches(last, [name[len(group) :]])]
    hint = did_you_mean(key, alike if group else valid)
    return hint if hint.endswith("?") else did_you_mean("", valid)


def unknown_key(key: str, value: object, valid: Sequence[str], owner: str = "") -> str:
    """Message about a key that does not exist, or is not an argument of the class ``owner``; it omits an empty value."""
    given = f" (value {value})" if value != "" else ""
    first, _, rest = key.partition(".")
    name = {"gpus": "devices", "num_processes": "devices"}.get(rest, rest)  # of Lightning 1
    if first == "trainer" and name in RESERVED_TRAINER_KEYS:
        return f"{key}{given}: cannot be set in a config; {RESERVED_TRAINER_KEYS[name]}."
    if owner:
        return f"{key}{given}: unknown argument of {owner}{suggest_key(key, valid)}"
    groups = {name.partition(".")[0] for name in valid}
    if rest and first not in groups:
        return f"{key}{given}: unknown key{did_you_mean(first, groups, rest)}"
    return f"{key}{given}: unknown key{suggest_key(key, valid)}"


def wrong_value(key: str, value: object, expected: Sequence[str], choices: Sequence[str] = (), typed: str | None = None) -> str:
    """Message about a value of another type than the ``expected`` ones.

    Args:
        choices: The valid words, if any.
        typed: The text in the file, if YAML reads it as another ``value``.
    """
    near = did_you_mean(str(value if typed is None else typed), choices)
    hint = near if near.endswith("?") else "."  # the choices are among what is expected
    if typed is None:
        return f"{key}: {str(value)!r} is not valid: expected {' or '.join(expected)}{hint}"
    if "str" in expected or typed in choices:
        hint = "; put it in quotes."
    return f"{key}: {typed!r}, which YAML reads as {value!r}, is not valid: expected {' or '.join(expected)}{hint}"


def missing_key(key: str, owner: str = "") -> str:
    """Message about a missing key, which the class ``owner``, or every config, requires."""
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
    """Message about ``inner``, an argument of a class that ``key`` has not set yet."""
    return f"{inner} (value {value}): the class is not known yet; set {key} before its arguments."
