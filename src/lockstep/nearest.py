"""The nearest valid names to a misspelt one."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``name``: the nearest valid ones, or all where there are few."""
    valid = sorted(valid)
    if near := get_close_matches(name, valid, n=3, cutoff=0.6):
        return f"; did you mean {' or '.join(map(repr, near))}?"
    if 0 < len(valid) <= 20:
        return f"; valid are {', '.join(valid)}."
    return "."
