"""The nearest valid names to a misspelt one."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, valid: Iterable[str], rest: str = "") -> str:
    """The end of a sentence about an unknown ``name``: the nearest valid ones, or all where there are few.

    Args:
        name: What was written. A dotted name is compared whole, then by its last part.
        valid: What could have been meant.
        rest: What followed ``name`` after a dot, repeated after each suggestion.
    """
    valid = sorted(set(valid))
    near = get_close_matches(name, valid, n=3, cutoff=0.6)
    if not near:
        last = {candidate.rpartition(".")[2].lower(): candidate for candidate in valid}
        near = [last[match] for match in get_close_matches(name.rpartition(".")[2].lower(), last, n=3, cutoff=0.6)]
    if near:
        return f"; did you mean {' or '.join(repr(f'{match}.{rest}' if rest else match) for match in near)}?"
    if 0 < len(valid) <= 20:
        return f"; valid are {', '.join(valid)}."
    return "."
