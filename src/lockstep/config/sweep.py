"""Expand a sweep into its runs."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from lockstep.core import UsageError

SweepPoint = dict[str, str]
"""Keys and values of one run of a sweep."""


def parse_sweep(texts: Sequence[str]) -> dict[str, list[str]]:
    """Parse texts of the form ``KEY=A,B,…``; commas inside brackets and quotes do not separate values.

    Raises:
        UsageError: A text has another form, an empty value, an unclosed bracket or the same value twice, or two texts have the
            same key.
    """
    sweep: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not re.fullmatch(r"\w[\w.]*", key) or not values:
            raise UsageError(f"--sweep: {text!r} must have the form KEY=A,B,…, such as model.lr=0.1,0.03.")
        if key in sweep:
            raise UsageError(f"--sweep: {key} is given twice; write all of its values after one --sweep.")
        sweep[key] = _split(values)
        if "" in sweep[key]:
            raise UsageError(f'--sweep: {text!r} has an empty value; write "" for an empty text.')
        if len(set(sweep[key])) < len(sweep[key]):
            raise UsageError(f"--sweep: {text!r} has the same value twice; remove one.")
    return sweep


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets and quotes."""
    parts, depth = [""], 0
    for token in re.findall(r"\"[^\"]*\"|'[^']*'|.", text, re.DOTALL):
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        if token == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += token
    if depth > 0:
        raise UsageError(f"--sweep: {text!r} has a bracket that is not closed; close it, or put it in quotes.")
    return parts


def sweep_points(sweep: Mapping[str, Sequence[str]]) -> tuple[SweepPoint, ...]:
    """One point for each combination of values; a single empty point without a sweep."""
    return tuple(dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values()))


def check_sweep_keys(sweep: Mapping[str, Sequence[str]], flags: Iterable[str]) -> None:
    """Raise UsageError for a key that must be the same in all runs of a sweep."""
    for name in sweep:
        if name.startswith("run."):
            raise UsageError(f"--sweep: {name} cannot be swept over; all runs of a sweep share one folder.")
        if name == "config" or name in flags:
            raise UsageError(f"--sweep: {name} cannot be swept over; submit once for each value.")
