"""Format counts and sizes for messages."""


def count(number: int | None, noun: str) -> str:
    """A number with its noun: ``1 rank``, ``2 ranks``, ``1,000 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if number is not None else f"unknown {noun}s"


def format_bytes(size: int | None) -> str:
    """Format a number of bytes, such as ``1.5 GiB``."""
    if size is None:
        return "?"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.{0 if size >= 100 * unit else 1}f} {name}"
    return "0" if size == 0 else f"{size} B"
