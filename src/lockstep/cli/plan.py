"""Print the memory that a model needs on each rank, and which strategies fit; without GPUs and without Slurm.

    {program} --nodes 4 --ranks-per-node 8 --config vit_6b      # how much memory 32 ranks need
    {program} --nodes 4 --profile a100 --config vit_6b          # and what fits into the GPUs of a profile

All other arguments are keys of the config.
"""

from collections.abc import Sequence

from lockstep.cli import submit


def main(arguments: Sequence[str]) -> int:
    """Print the plan for the resources and the config in ``arguments``, which are those of ``lockstep submit``."""
    return submit.main(["--plan", *arguments], "lockstep plan", __doc__)
