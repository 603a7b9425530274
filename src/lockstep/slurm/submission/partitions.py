"""The partitions of a cluster, and the explanation of why Slurm rejects a job there."""

from collections.abc import Sequence

from lockstep.core import UsageError, count
from lockstep.slurm import Partition, parse_rejection
from lockstep.slurm.submission.batch_script import JobRequest, node_cpus
from lockstep.slurm.submission.profile import parse_minutes


def _requested(request: JobRequest, partitions: Sequence[Partition]) -> list[Partition]:
    """The partitions that a job may run in."""
    names = request.profile.partition.split(",") if request.profile.partition else []
    return [p for p in partitions if p.name in names or (not names and p.is_default)]


def fits_when_all_nodes_are_up(request: JobRequest, partitions: Sequence[Partition]) -> bool:
    """Whether the job fits once all nodes that are now down or drained are up again."""
    profile = request.profile
    suitable = [
        p
        for p in _requested(request, partitions)
        if int(p.cpus.rstrip("+")) >= node_cpus(profile) and p.gpus >= profile.gpus_per_node
    ]
    return any(p.is_unavailable for p in suitable) and sum(int(p.nodes) for p in suitable) >= request.options.nodes.min


def check_time_limit(request: JobRequest, minutes: int, partitions: Sequence[Partition]) -> None:
    """Raise UsageError if the time limit exceeds that of the partitions; most clusters queue such a job forever."""
    limits = [p.time for p in _requested(request, partitions)]
    if limits and not any(limit in ("infinite", "n/a") or parse_minutes(limit) >= minutes for limit in limits):
        raise UsageError(explain_rejection("The time limit exceeds that of the partition", request, partitions))


def explain_rejection(output: str, request: JobRequest, partitions: Sequence[Partition]) -> str:
    """Return a sentence with the error of ``sbatch`` in ``output``, the requested and the available resources."""
    profile = request.profile
    plural = "" if request.options.nodes.max == 1 else "s"
    requested = [f"{request.options.nodes} node{plural} of {count(profile.ranks, 'rank')}"]
    requested += [f"{count(profile.gpus_per_node, 'GPU')} per node"] if profile.gpus_per_node else []
    requested += [f"{count(profile.cpus, 'CPU')} per rank"] if profile.cpus else []
    requested += [f"{profile.mem} of memory per node"] if profile.mem else []
    requested += [f"{profile.time} of time"] if profile.time else []
    requested += [f"an array of {request.runs} runs (limited by MaxArraySize in slurm.conf)"] if request.runs > 1 else []
    kinds: dict[Partition, int] = {}
    for partition in _requested(request, partitions):
        kind = partition._replace(nodes="", state="")
        kinds[kind] = kinds.get(kind, 0) + int(partition.nodes)
    available = "; ".join(str(kind._replace(nodes=str(nodes))) for kind, nodes in kinds.items())
    if not available:
        names = dict.fromkeys(p.name for p in partitions)
        available = f"partitions are {', '.join(names)}" if names else "sinfo lists no partitions"
    return f"Slurm rejects this job: {parse_rejection(output)}. Requested: {', '.join(requested)}; {available}."
