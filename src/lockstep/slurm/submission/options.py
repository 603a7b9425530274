"""The launcher's own options: the flags that are keys of neither a profile nor a config."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.core import UsageError
from lockstep.runs import Run, nothing_left
from lockstep.slurm import Dependency
from lockstep.slurm.submission.profile import Profile


@dataclass(frozen=True)
class NodeRange:
    """The number of nodes of a job: fixed where ``min`` equals ``max``, else chosen by Slurm at each start of the job."""

    min: int
    max: int

    def __str__(self) -> str:
        return f"{self.min}-{self.max}" if self.is_range else str(self.max)

    @property
    def is_range(self) -> bool:
        return self.min != self.max

    @classmethod
    def parse(cls, text: str) -> "NodeRange":
        """Parse ``4`` or ``2-4``; a type of flags."""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of nodes; write 4, or 2-4")
        nodes = cls(int(match[1]), int(match[2] or match[1]))
        if not 1 <= nodes.min <= nodes.max:
            raise argparse.ArgumentTypeError(f"{text} must be 1 or more, the smaller number first")
        return nodes


@dataclass(frozen=True)
class LaunchOptions:
    """How to submit a run or sweep.

    Attributes:
        working_directory: Folder of submission, and current folder of the ranks.
        command_line: The launcher's whole command line, for the record.
        job_name: None takes that of the run.
        after: Conditions on other jobs.
        sweep: Keys of the config and the values of each; empty without a sweep.
        reads_data: Whether the run reads its data; false if only its memory is planned.
        array_parallelism: How many runs of a sweep may run at the same time.
        resume: A run to resume with its own code; None creates a new one.
        follows: Folder of the run or sweep that it starts after, and whose newest checkpoint it uses; None without.
        is_held: Whether it does not start before ``scontrol release``.
        profile: Name or file of the profile, for the record.
    """

    working_directory: Path
    command_line: Sequence[str] = ()
    nodes: NodeRange = NodeRange(1, 1)
    job_name: str | None = None
    after: Dependency | None = None
    sweep: Mapping[str, Sequence[str]] = field(default_factory=dict)
    array_parallelism: int = 256
    snapshot: bool = True
    reads_data: bool = True
    resume: Run | None = None
    follows: Path | None = None
    is_held: bool = False
    profile: str | None = None

    def check(self, config: Mapping[str, Any], profile: Profile) -> None:
        """Raise UsageError if there is nothing to ``resume``, or the run needs GPUs that are not requested."""
        if self.resume and self.sweep:
            raise UsageError(f"--resume: {self.resume.folder} is a single run; it cannot be combined with --sweep.")
        if self.resume and (why := nothing_left(self.resume, config)):
            raise UsageError(f"--resume: {why}")
        accelerator = config["trainer"].get("accelerator")
        has_gpus = profile.gpus_per_node or any("gpu" in argument for argument in profile.sbatch)
        if accelerator in ("gpu", "cuda") and not has_gpus:
            raise UsageError(f"trainer.accelerator: {accelerator!r} needs GPUs; request some with --gpus-per-node.")
        may_share_gpus = accelerator == "cpu" or config["distributed"]["backend"] == "gloo"
        if 0 < profile.gpus_per_node < profile.ranks and not may_share_gpus:
            raise UsageError(
                f"ranks_per_node: {profile.ranks} ranks need a GPU each, and gpus_per_node is {profile.gpus_per_node}; request "
                "as many GPUs as ranks, or use --trainer.accelerator cpu."
            )
