"""The launchers' flags, and the environment in which they ask Slurm: a mistake in either is one sentence, as everywhere."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.core import UsageError
from lockstep.slurm.submission.profile import Profile


@dataclass(frozen=True)
class NodeRange:
    """How many nodes a job takes: a number, or a range of which each start of the job gets what there is.

    Attributes:
        min, max: Of the range.
    """

    min: int
    max: int

    def __str__(self) -> str:
        return str(self.max) if self.min == self.max else f"{self.min}-{self.max}"

    @classmethod
    def parse(cls, text: str) -> "NodeRange":
        """``4``, or ``2-4``."""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of nodes; write 4, or 2-4")
        nodes = cls(int(match[1]), int(match[2] or match[1]))
        if not 1 <= nodes.min <= nodes.max:
            raise argparse.ArgumentTypeError(f"{text} must be 1 or more, the smaller number first")
        return nodes


def check_resources(config: Mapping[str, Any], profile: Profile, nodes: NodeRange) -> None:
    """Raise about what does not go together with the resources."""
    accelerator = config["trainer"].get("accelerator")
    if (
        accelerator in ("gpu", "cuda")
        and not profile.gpus_per_node
        and not any("gpu" in argument for argument in profile.sbatch)
    ):
        raise UsageError(f"trainer.accelerator: {accelerator!r} needs GPUs; ask for some with --gpus-per-node.")
    data = config["data"]
    size = data.get("init_args", {}).get("batch_size") if isinstance(data, Mapping) else None
    if str(data and data.get("class_path")).startswith("lockstep.data.") and isinstance(size, int):
        if size < 1:
            raise UsageError(f"data.batch_size: {size} must be 1 or more.")
        for ranks in (number * profile.ranks for number in range(nodes.min, nodes.max + 1)):
            if size % ranks:
                raise UsageError(f"data.batch_size: {size} is the global batch and does not divide by {ranks} ranks.")
