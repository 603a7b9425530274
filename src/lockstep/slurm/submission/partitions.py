"""The partitions of a cluster, and the explanation of why Slurm rejects a job there."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lockstep.core import UsageError, count
from lockstep.slurm import query_slurm
from lockstep.slurm.submission.batch_script import JobRequest
from lockstep.slurm.submission.profile import parse_minutes


@dataclass(frozen=True)
class Partition:
    """Nodes of one kind in a partition, as ``sinfo`` prints them; where they differ, ``cpus`` and ``memory`` end with +."""

    name: str
    is_default: bool
    nodes: str
    cpus: str
    memory: str
    gres: str
    time: str
    state: str

    @property
    def gpus(self) -> int:
        """GPUs per node."""
        return sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", self.gres))

    def __str__(self) -> str:
        gpus = self.gres if self.gres != "(null)" else "no GPUs"
        return (
            f"partition {self.name} has {count(int(self.nodes), 'node')}, each {self.cpus} CPUs, {self.memory} MB, {gpus}, "
            f"and a time limit of {self.time}"
        )


def query_partitions(env: Mapping[str, str]) -> list[Partition]:
    """Return all partitions, one entry per kind of node."""
    command = ["sinfo", "--all", "--exact", "--noheader", "--format=%R|%P|%D|%c|%m|%G|%l|%T"]
    rows = query_slurm(command, env).stdout.splitlines()
    return [Partition(name, label.endswith("*"), *rest) for name, label, *rest in (row.split("|") for row in rows)]


def _requested(request: JobRequest, partitions: Sequence[Partition]) -> list[Partition]:
    """The partitions that a job may run in."""
    names = request.profile.partition.split(",") if request.profile.partition else []
    return [p for p in partitions if p.name in names or (not names and p.is_default)]


def fits_when_all_nodes_are_up(request: JobRequest, partitions: Sequence[Partition]) -> bool:
    """Whether the job fits once nodes that are down or drained now are back."""
    profile = request.profile
    cpus = profile.ranks * (profile.cpus or 1)
    suitable = [
        p for p in _requested(request, partitions) if int(p.cpus.rstrip("+")) >= cpus and p.gpus >= profile.gpus_per_node
    ]
    unavailable = any(re.match(r"down|drain|drng|maint|reserved|fail|unk|no_resp|power", p.state) for p in suitable)
    return unavailable and sum(int(p.nodes) for p in suitable) >= request.options.nodes.min


def check_time_limit(request: JobRequest, minutes: int, partitions: Sequence[Partition]) -> None:
    """Raise UsageError if the time limit exceeds that of the partitions; most clusters queue such a job for ever."""
    limits = [p.time for p in _requested(request, partitions)]
    if limits and not any(limit in ("infinite", "n/a") or parse_minutes(limit) >= minutes for limit in limits):
        raise UsageError(explain_rejection("The time limit exceeds that of the partition", request, partitions))


def explain_rejection(output: str, request: JobRequest, partitions: Sequence[Partition]) -> str:
    """Return a sentence with the error in ``output`` of ``sbatch``, the requested resources, and the available ones."""
    errors = re.findall(r"(?:sbatch: error: |allocation failure: |Batch job submission failed: )([^\n]+)", output)
    error = errors[-1].rpartition("failed: ")[2] if errors else " ".join(output.split())
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
        kind = replace(partition, nodes="", state="")
        kinds[kind] = kinds.get(kind, 0) + int(partition.nodes)
    available = "; ".join(str(replace(kind, nodes=str(nodes))) for kind, nodes in kinds.items())
    if not available:
        names = dict.fromkeys(p.name for p in partitions)
        available = f"partitions are {', '.join(names)}" if names else "sinfo lists no partitions"
    return f"Slurm rejects this job: {error.rstrip('.')}. Requested: {', '.join(requested)}; {available}."
