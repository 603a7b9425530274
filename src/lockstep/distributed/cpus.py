"""The CPUs of each rank of a node: an equal share of those of the job, near the GPU of the rank."""

import os
from collections.abc import Mapping, Sequence

from lockstep.compat.nvml import cpus_near_gpus


def share_cpus(ranks: int, env: Mapping[str, str]) -> list[set[int]] | None:
    """The CPUs of each rank of this node; None where they cannot be divided.

    Slurm has bound this process to the CPUs of the job. Where it has not, they may be used by other jobs, too.
    """
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(mine) < ranks or len(mine) > int(env.get("SLURM_CPUS_ON_NODE", "0")):
        return None
    near = cpus_near_gpus(env)
    return divide(mine, near if len(near) >= ranks else [mine] * ranks, ranks)


def divide(cpus: set[int], near: Sequence[set[int]], ranks: int) -> list[set[int]]:
    """Divide ``cpus`` into equal shares; those ``near`` the GPU of a rank go to it first."""
    count, left = len(cpus) // ranks, set(cpus)
    shares: list[set[int]] = []
    for index in range(ranks):
        share = sorted(left & near[index])[:count]
        left -= set(share)
        shares.append(set(share))
    for share_ in shares:  # CPUs that are near no GPU of a rank that lacks some
        more = sorted(left)[: count - len(share_)]
        share_ |= set(more)
        left -= set(more)
    return shares
