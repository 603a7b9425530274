"""A table of the strategies that fit into the memory of a rank, and a recommendation."""

from dataclasses import dataclass
from functools import cached_property

from rich.table import Table

from lockstep.core import count, format_bytes
from lockstep.planning.memory import STRATEGIES, MemoryEstimate, ModelProfile, TrainingOptions, estimate_memory

USABLE_FRACTION = 0.9
"""Usable part of a device's memory; the rest is for the CUDA context, NCCL and fragmentation."""


@dataclass(frozen=True)
class Resources:
    """Resources of a submission.

    Attributes:
        nodes: The maximum number of nodes requested.
        ranks: Ranks per node.
        memory: Bytes per rank, of its GPU or, without one, of its node; None if unknown.
        host: Bytes of CPU memory per node; None if unknown.
    """

    nodes: int
    ranks: int
    on_gpu: bool
    memory: int | None = None
    host: int | None = None

    def node_counts(self) -> list[int]:
        """Powers of two up to the requested nodes, at least up to 8, and the requested number."""
        powers = [1 << power for power in range(max(8, self.nodes).bit_length())]
        return sorted({*powers, self.nodes})


@dataclass(frozen=True)
class PlanRow:
    """One strategy on one number of nodes.

    Attributes:
        batch: Samples per rank in a backward pass; None if unknown or if the global batch is not divisible.
        strategy: One of ``STRATEGIES``.
        obstacle: Why it cannot run, in a few words; empty if it can, None if unknown.
    """

    nodes: int
    batch: int | None
    strategy: str
    estimate: MemoryEstimate
    obstacle: str | None


@dataclass(frozen=True)
class Plan:
    """All strategies for one model.

    Attributes:
        zero_obstacle: Why ZeRO cannot run, in a few words; empty if it can.
    """

    model: ModelProfile
    resources: Resources
    options: TrainingOptions
    zero_obstacle: str = ""

    @property
    def startup(self) -> int:
        """Bytes of CPU memory per node at the start: each rank builds the whole model there, in float32."""
        return 4 * self.model.parameters * self.resources.ranks

    @cached_property
    def rows(self) -> list[PlanRow]:
        """All rows, by number of nodes."""
        rows = []
        for nodes in self.resources.node_counts():
            ranks = nodes * self.resources.ranks
            batch = self.model.batch_on(ranks)
            for strategy in STRATEGIES:
                estimate = estimate_memory(strategy, self.model, ranks, batch or 0, self.options)
                if self.model.global_batch is not None and batch is None:
                    obstacle: str | None = f"no: {count(self.model.global_batch, 'sample')}, {count(ranks, 'rank')}"
                elif strategy != "ddp" and self.zero_obstacle:
                    obstacle = f"no: {self.zero_obstacle}"
                else:
                    obstacle = self._memory_obstacle(estimate)
                rows.append(PlanRow(nodes, batch, strategy, estimate, obstacle))
        return rows

    def _memory_obstacle(self, estimate: MemoryEstimate) -> str | None:
        """Why ``estimate`` does not fit; empty if it fits, None if unknown."""
        memory, host = self.resources.memory, self.resources.host
        if memory is not None and estimate.total + (0 if self.resources.on_gpu else estimate.host) > USABLE_FRACTION * memory:
            return "no"
        if host and max(self.startup, self.resources.ranks * estimate.host) > USABLE_FRACTION * host:
            return "no: CPU memory"
        return None if memory is None or estimate.activations is None else ""

    def table(self) -> Table:
        """Bytes per rank, one line per strategy and number of nodes."""
        table = Table(box=None, pad_edge=False)
        table.add_column("nodes × ranks", no_wrap=True)
        table.add_column("batch", justify="right")
        table.add_column("strategy", no_wrap=True)
        for name in ("weights", "gradients", "optimizer", "buffers", "activations", "peak", "in CPU memory"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("fits", no_wrap=True)
        nodes = 0
        for row in self.rows:
            need = row.estimate
            sizes = (need.weights, need.gradients, need.optimizer, need.buffers, need.activations, need.total, need.host)
            first = (f"{row.nodes} × {self.resources.ranks}", "?" if row.batch is None else str(row.batch))
            fits = {None: "?", "": "yes"}.get(row.obstacle, row.obstacle)
            table.add_row(*(first if row.nodes != nodes else ("", "")), row.strategy, *map(format_bytes, sizes), fits)
            nodes = row.nodes
        return table

    def recommendation(self) -> str:
        """Which strategy to use, in one sentence."""
        if self.resources.memory is None:
            key = "gpu_memory (--gpu-memory 80G)" if self.resources.on_gpu else "mem (--mem 64G)"
            return f"Set {key} in the profile to see what fits."
        fitting = [row for row in self.rows if row.obstacle == ""]
        for row in fitting:
            if row.nodes == self.resources.nodes:
                need, memory = format_bytes(row.estimate.total), format_bytes(self.resources.memory)
                return f"Use {strategy_flags(row.strategy)}: {need} of {memory} per rank."
        for row in fitting:
            if row.nodes > self.resources.nodes:
                requested = count(self.resources.nodes, "node")
                return f"Nothing fits on {requested}; use --nodes {row.nodes} with {strategy_flags(row.strategy)}."
        if not fitting and any(row.obstacle is None for row in self.rows):
            return "Use the first strategy that leaves room for the activations, whose size is unknown."
        return "Nothing fits; use a smaller batch (and accumulate gradients), or activation_checkpointing."


def strategy_flags(strategy: str) -> str:
    """Command-line flags that select ``strategy``."""
    if strategy == "ddp":
        return "--strategy ddp"
    offload = " --deepspeed.offload_optimizer cpu --deepspeed.offload_param cpu" if strategy.endswith("offload") else ""
    return f"--strategy deepspeed --deepspeed.stage {strategy.removeprefix('zero')[0]}{offload}"
