"""Submit a run to Slurm: profile, resource checks, batch script, sbatch."""

from lockstep.slurm.submission.chain import LINK_COMMANDS, Chain, Link
from lockstep.slurm.submission.options import LaunchOptions, NodeRange
from lockstep.slurm.submission.preflight import plan_memory, resolve_config
from lockstep.slurm.submission.profile import (
    PROFILE_FLAGS,
    Profile,
    apply_flags,
    check_heterogeneous,
    load_profile,
    profile_folders,
)
from lockstep.slurm.submission.resumption import describe_resources, submitted_nodes, submitted_profile
from lockstep.slurm.submission.sbatch import scrub_environment
from lockstep.slurm.submission.submission import Submission, begin_trial
