"""The rank and world size of this process, read once from the environment and checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lockstep.core.errors import UsageError


@dataclass(frozen=True)
class World:
    """This process's rank among all ranks of a job.

    Attributes:
        rank: Rank of this process, 0 to ``size - 1``; the ranks of a node are consecutive.
        local_size: Ranks on each node; every node has the same number.
        rendezvous: ``init_method`` of ``torch.distributed.init_process_group``: ``file://…``, ``tcp://address:port``
            or ``env://``. Empty for a single process.
        launcher: What started the ranks: ``local``, ``agent`` (on Slurm), ``torchrun``, ``slurm`` (plain srun), ``submitit``,
            or ``process`` for a single one.
        listener: Descriptor of the socket on which rank zero accepts the other ranks; None if it opens one for ``rendezvous``.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    rendezvous: str = ""
    launcher: str = "process"
    listener: int | None = field(default=None, compare=False)

    @property
    def nodes(self) -> int:
        """Number of nodes of the job."""
        return self.size // self.local_size

    @property
    def node_rank(self) -> int:
        """Number of this node in the job."""
        return self.rank // self.local_size

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank logs and writes."""
        return self.rank == 0

    def environ(self) -> dict[str, str]:
        """Environment variables of this rank, named as torchrun names them; ``from_env`` reads them back."""
        variables = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "GROUP_RANK": str(self.node_rank),
            "LOCKSTEP_LAUNCHER": self.launcher,
            "LOCKSTEP_RENDEZVOUS": self.rendezvous,
        }
        if self.launcher == "agent":  # one task of Slurm per node; code that reads Slurm's variables expects one per rank
            variables |= {
                "SLURM_PROCID": str(self.rank),
                "SLURM_LOCALID": str(self.local_rank),
                "SLURM_NTASKS": str(self.size),
                "SLURM_NPROCS": str(self.size),
                "SLURM_STEP_NUM_TASKS": str(self.size),
                "SLURM_NTASKS_PER_NODE": str(self.local_size),
            }
        if address := re.fullmatch(r"tcp://\[?(.+?)]?:(\d+)", self.rendezvous):
            variables |= {"MASTER_ADDR": address[1], "MASTER_PORT": address[2]}
        return variables

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "World":
        """Read the world from environment variables.

        The first that applies: torchrun or ``launch/local.py`` (``RANK``, ``WORLD_SIZE`` …), a task of a Slurm step
        (``SLURM_STEP_ID``), submitit's local executor, a single process. A shell in a Slurm allocation is a single
        process: only ``srun`` starts ranks.

        Raises:
            UsageError: A variable is missing or not a number, or variables contradict each other; all are named.
        """
        step = "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
        if "TORCHELASTIC_RUN_ID" not in env and "LOCKSTEP_LAUNCHER" not in env and step:
            return cls._from_slurm(env)
        if "RANK" in env or "WORLD_SIZE" in env:
            return cls._from_torchrun(env)
        if "SUBMITIT_LOCAL_GLOBALID" in env:
            return cls._from_submitit(env)
        return cls()

    @classmethod
    def _from_torchrun(cls, env: Mapping[str, str]) -> "World":
        size = _number(env, "WORLD_SIZE")
        address = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}" if {"MASTER_ADDR", "MASTER_PORT"} <= set(env) else ""
        # torchrun's agent already listens on MASTER_PORT; only env:// can join it.
        rendezvous = "env://" if "TORCHELASTIC_RUN_ID" in env else env.get("LOCKSTEP_RENDEZVOUS", address)
        if size > 1 and not rendezvous:
            raise UsageError(f"WORLD_SIZE={size} needs MASTER_ADDR and MASTER_PORT, where the ranks meet; set both.")
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        return cls._checked(env, names, rendezvous, env.get("LOCKSTEP_LAUNCHER", "torchrun"))

    @classmethod
    def _from_slurm(cls, env: Mapping[str, str]) -> "World":
        if "SLURM_HET_SIZE" in env:
            raise UsageError(
                f"SLURM_HET_SIZE={env['SLURM_HET_SIZE']}: this is a heterogeneous job, and all nodes of a run have the same "
                "number of ranks; start the ranks in a job of one component."
            )
        for ours, theirs in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")):
            if ours in env and _number(env, ours) != _number(env, theirs):
                raise UsageError(
                    f"{ours}={env[ours]} contradicts {theirs}={env[theirs]}; unset {ours} or start the ranks another way."
                )
        tasks, nodes = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_STEP_NUM_NODES")
        layout = env.get("SLURM_STEP_TASKS_PER_NODE", "")
        if tasks % nodes or "," in layout:
            raise UsageError(
                f"SLURM_STEP_NUM_TASKS={tasks} on SLURM_STEP_NUM_NODES={nodes} (SLURM_STEP_TASKS_PER_NODE={layout}): "
                "every node must have the same number of ranks; use --ntasks-per-node."
            )
        address = env.get("MASTER_ADDR") or env.get("SLURM_LAUNCH_NODE_IPADDR")
        if tasks > 1 and not address:
            raise UsageError(
                f"SLURM_STEP_NUM_TASKS={tasks}, but neither MASTER_ADDR nor SLURM_LAUNCH_NODE_IPADDR is set; "
                "start the ranks with srun."
            )
        # Any port that all ranks can compute; a launcher may set MASTER_PORT instead.
        port = env.get("MASTER_PORT") or str(15000 + _number(env, "SLURM_JOB_ID") % 10000)
        rendezvous = f"tcp://{address}:{port}" if tasks > 1 else ""
        counted = dict(env) | {"SLURM_STEP_TASKS_PER_NODE": str(tasks // nodes)}
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")
        return cls._checked(counted, names, rendezvous, "submitit" if "SUBMITIT_EXECUTOR" in env else "slurm")

    @classmethod
    def _from_submitit(cls, env: Mapping[str, str]) -> "World":
        size = _number(env, "SUBMITIT_LOCAL_NTASKS")
        rendezvous = env.get("LOCKSTEP_RENDEZVOUS", "")
        if size > 1 and not rendezvous:
            raise UsageError(f"SUBMITIT_LOCAL_NTASKS={size} needs LOCKSTEP_RENDEZVOUS, where the ranks meet; set it.")
        counted = dict(env) | {"SUBMITIT_LOCAL_TASKS_PER_NODE": str(size)}
        names = [f"SUBMITIT_LOCAL_{name}" for name in ("GLOBALID", "NTASKS", "LOCALID", "TASKS_PER_NODE", "NODEID")]
        return cls._checked(counted, names, rendezvous, "submitit")

    @classmethod
    def _checked(cls, env: Mapping[str, str], names: Sequence[str], rendezvous: str, launcher: str) -> "World":
        """Read the five variables ``names``: rank, world size, local rank, ranks per node and node rank."""
        rank, size, local_rank, local_size = (_number(env, name) for name in names[:4])
        values = ", ".join(f"{name}={env[name]}" for name in names if name in env)
        if size < 1 or local_size < 1 or size % local_size:
            raise UsageError(f"{size} ranks do not divide into nodes of {local_size} ({values}).")
        if not 0 <= rank < size:
            raise UsageError(f"Rank {rank} is outside 0…{size - 1} ({values}).")
        if rank % local_size != local_rank:
            raise UsageError(
                f"Rank {rank} on nodes of {local_size} must be local rank {rank % local_size}, not {local_rank} ({values})."
            )
        world = cls(rank, size, local_rank, local_size, rendezvous, launcher)
        if names[4] in env and _number(env, names[4]) != world.node_rank:
            raise UsageError(f"Rank {rank} on nodes of {local_size} is on node {world.node_rank} ({values}).")
        return world


def _number(env: Mapping[str, str], name: str) -> int:
    if name not in env:
        raise UsageError(f"{name} is not set, but other variables of the same launcher are.")
    try:
        return int(env[name])
    except ValueError:
        raise UsageError(f"{name}={env[name]!r} is not an integer.") from None
