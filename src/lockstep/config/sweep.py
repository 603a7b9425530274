"""The runs of a sweep: keys and the values that they take in turn. No torch here."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from lockstep.core import UsageError

SweepPoint = dict[str, str]
"""The values that one run of a sweep has, by key."""


def parse_sweep(given: Sequence[str]) -> dict[str, list[str]]:
    """Keys and their values from ``KEY=A,B,…``; commas inside brackets and quotes do not part values.

    Raises:
        UsageError: One is not of that form, has a value twice, or a key is given twice.
    """
    sweep: dict[str, list[str]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or not re.fullmatch(r"\w[\w.]*", key) or not values:
            raise UsageError(f"--sweep: {text!r} must be of the form KEY=A,B,…, such as model.lr=0.1,0.03.")
        if key in sweep:
            raise UsageError(f"--sweep: {key} is given twice; write all of its values after one --sweep.")
        if re.search(r",,|^,|,$", values):
            raise UsageError(f'--sweep: {text!r} has an empty value; write "" for an empty text.')
        sweep[key] = re.findall(r"((?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'|[^,])+)", values)
        if len(set(sweep[key])) < len(sweep[key]):
            raise UsageError(f"--sweep: {text!r} has a value twice.")
    return sweep


def sweep_points(sweep: Mapping[str, Sequence[str]]) -> tuple[SweepPoint, ...]:
    """One point for each combination of values; a single empty one without a sweep."""
    return tuple(dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values()))


def check_sweep_keys(sweep: Mapping[str, Sequence[str]], flags: Iterable[str]) -> None:
    """Raise UsageError about a key that all runs of a sweep have in common."""
    for name in sweep:
        if name.startswith("run."):
            raise UsageError(f"--sweep: {name} cannot be swept over; runs of a sweep share the folder of their name.")
        if name == "config" or name in flags:
            raise UsageError(f"--sweep: {name} cannot be swept over; submit once for each.")
