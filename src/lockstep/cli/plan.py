"""``lockstep plan``: the memory that a model needs on each rank, and which strategies fit."""

from collections.abc import Sequence

from lockstep.cli import submit


def main(arguments: Sequence[str]) -> int:
    """Print the plan for the resources and the config in ``arguments``, which are those of ``lockstep submit``."""
    return submit.main(["--plan", *arguments], "lockstep plan")
