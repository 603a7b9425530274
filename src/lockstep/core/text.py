"""Words of messages."""


def count(number: int | None, noun: str) -> str:
    """A number with its noun: ``1 rank``, ``2 ranks``, ``1,000 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if number is not None else f"unknown {noun}s"
