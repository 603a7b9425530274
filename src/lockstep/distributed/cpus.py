"""Divide the CPUs of a job among the ranks of a node: equal shares, each near the GPU of its rank."""

import os
from collections.abc import Mapping, Sequence

import torch

from lockstep.compat.nvml import cpus_near_gpus


def share_cpus(ranks: int, env: Mapping[str, str]) -> list[set[int]] | None:
    """The CPUs of each rank of this node; None if they cannot be divided.

    They are divided only if Slurm has bound this process to the CPUs of the job. Otherwise other jobs may use them too.
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
        shares.append(set(sorted(left & near[index])[:count]))
        left -= shares[-1]
    for share in shares:  # too few CPUs are near the GPU of some ranks: they get others
        share |= set(sorted(left)[: count - len(share)])
        left -= share
    return shares


def set_threads(on_gpu: bool, ranks: int) -> None:
    """Set the number of threads of an operation on the CPU, unless OMP_NUM_THREADS does; for one of ``ranks`` of this node."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    # On CPUs one thread, as with torchrun: else the last digit of a sum would depend on how the ranks are spread over nodes.
    # With GPUs those of the rank's own CPUs, or its share of all. Without the variable, Lightning would divide them again.
    own = min(len(os.sched_getaffinity(0)), max(1, (os.cpu_count() or 1) // ranks)) if on_gpu else 1
    torch.set_num_threads(own)
    os.environ["OMP_NUM_THREADS"] = str(own)
