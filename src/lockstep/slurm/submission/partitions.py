"""What a cluster offers, and why it does not take a request, in one sentence. No torch here: the launcher uses this room."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lockstep.core import UsageError
from lockstep.slurm import query_slurm
from lockstep.slurm.submission.batch_script import JobRequest
from lockstep.slurm.submission.profile import parse_minutes


@dataclass(frozen=True)
class Partition:
    """A partition, as ``sinfo`` describes it; where its nodes differ, CPUs and memory are the least, with a +."""

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
        """GPUs of each node."""
        return sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", self.gres))

    def __str__(self) -> str:
        gpus = self.gres if self.gres != "(null)" else "no GPUs"
        return (
            f"partition {self.name} has {self.nodes} nodes, each {self.cpus} CPUs, {self.memory} MB, {gpus}, "
            f"and a time limit of {self.time}"
        )


def query_partitions(env: Mapping[str, str]) -> list[Partition]:
    """All partitions; ``sinfo`` has a row for each kind of node."""
    command = ["sinfo", "--all", "--exact", "--noheader", "--format=%R|%P|%D|%c|%m|%G|%l|%T"]
    rows = query_slurm(command, env).stdout.splitlines()
    return [Partition(name, marked.endswith("*"), *rest) for name, marked, *rest in (row.split("|") for row in rows)]


def _requested(request: JobRequest, partitions: Sequence[Partition]) -> list[Partition]:
    """The partitions that a request may run in."""
    names = request.profile.partition.split(",") if request.profile.partition else []
    return [p for p in partitions if p.name in names or (not names and p.is_default)]


def fits_when_all_nodes_are_up(request: JobRequest, partitions: Sequence[Partition]) -> bool:
    """Whether nodes that are down or drained now could make up for what is missing."""
    chosen, profile = _requested(request, partitions), request.profile
    cpus = profile.ranks * (profile.cpus or 1)
    fitting = [p for p in chosen if int(p.cpus.rstrip("+")) >= cpus and p.gpus >= profile.gpus_per_node]
    away = [p for p in fitting if re.match(r"down|drain|drng|maint|reserved|fail|unk|no_resp|power", p.state)]
    return bool(away) and sum(int(p.nodes) for p in fitting) >= request.nodes.min


def check_time_limit(request: JobRequest, asked: int, partitions: Sequence[Partition]) -> None:
    """Raise UsageError about a job that most clusters would queue and never start; ``--test-only`` says nothing either."""
    limits = [p.time for p in _requested(request, partitions)]
    if not limits or any(limit in ("infinite", "n/a") or parse_minutes(limit) >= asked for limit in limits):
        return
    raise UsageError(explain_rejection("The time limit is longer than the partition's", request, partitions))


def explain_rejection(said: str, request: JobRequest, partitions: Sequence[Partition]) -> str:
    """What Slurm said, what was asked for, and what there is."""
    errors = re.findall(r"(?:sbatch: error: |allocation failure: |Batch job submission failed: )([^\n]+)", said)
    words = errors[-1].rpartition("failed: ")[2] if errors else " ".join(said.split())
    profile = request.profile
    asked = [f"{request.nodes} node{'' if request.nodes.max == 1 else 's'} of {_count(profile.ranks, 'rank')}"]
    asked += [f"{_count(profile.gpus_per_node, 'GPU')} per node"] if profile.gpus_per_node else []
    asked += [f"{_count(profile.cpus, 'CPU')} per rank"] if profile.cpus else []
    asked += [f"{profile.mem} of memory per node"] if profile.mem else []
    asked += [f"{profile.time} of time"] if profile.time else []
    asked += [f"an array of {request.runs} runs (MaxArraySize of slurm.conf is the limit)"] if request.runs > 1 else []
    kinds: dict[Partition, int] = {}
    for partition in _requested(request, partitions):
        kind = replace(partition, nodes="", state="")
        kinds[kind] = kinds.get(kind, 0) + int(partition.nodes)
    there_is = "; ".join(str(replace(kind, nodes=str(nodes))) for kind, nodes in kinds.items())
    if not there_is:
        names = dict.fromkeys(p.name for p in partitions)
        there_is = f"partitions are {', '.join(names)}" if names else "sinfo knows no partition"
    return f"Slurm does not take this job: {words.rstrip('.')}. Asked for: {', '.join(asked)}; {there_is}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
