"""Which ways to train fit into the memory of a rank: a table, and one sentence about which to take. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from rich.table import Table

from lockstep.config import DDPOptions, DeepSpeedOptions
from lockstep.planning.memory import STRATEGIES, USABLE_FRACTION, MemoryEstimate, ModelProfile, estimate_memory

_GIB = 1 << 30


@dataclass(frozen=True)
class Resources:
    """What of a submission decides what fits.

    Attributes:
        nodes: Most that were asked for.
        ranks: On each node.
        on_gpu: Whether each rank has a GPU.
        memory: Bytes that each rank has, on its GPU or, without one, of its node; None if nobody said.
        host: Bytes of a node's own memory; None if nobody said.
    """

    nodes: int
    ranks: int
    on_gpu: bool
    memory: int | None = None
    host: int | None = None

    def node_counts(self) -> list[int]:
        """1, 2, 4 … up to the nodes that were asked for, and at least to 8."""
        powers = [1 << power for power in range(max(8, self.nodes).bit_length())]
        return sorted({*powers, self.nodes})


@dataclass(frozen=True)
class PlanRow:
    """One strategy to train on one number of nodes.

    Attributes:
        nodes: Nodes.
        ranks: On all of them.
        batch: Samples of a rank in a backward pass; None where they do not divide, or are not known.
        strategy: One of ``WAYS``.
        estimate: Bytes of a rank.
        obstacle: Why it cannot be, in a few words; empty if it can, None if nobody knows.
    """

    nodes: int
    ranks: int
    batch: int | None
    strategy: str
    estimate: MemoryEstimate
    obstacle: str | None


@dataclass(frozen=True)
class Plan:
    """All ways to train one model.

    Attributes:
        model: What it is.
        resources: What there is.
        precision: As in lightning's Trainer, ``auto`` resolved.
        ddp, zero: Options of the strategies.
        accumulate: Batches of a step.
        only_ddp: Why ZeRO cannot be, in a word or two; empty if it can.
    """

    model: ModelProfile
    resources: Resources
    precision: str
    ddp: DDPOptions
    zero: DeepSpeedOptions
    accumulate: int = 1
    only_ddp: str = ""

    @property
    def start(self) -> int:
        """Bytes of a node's own memory that its ranks need at first: each makes the whole model there, in float32."""
        return 4 * self.model.parameters * self.resources.ranks

    @cached_property
    def rows(self) -> list[PlanRow]:
        """All of them, on few nodes first."""
        return list(self._rows())

    def _rows(self) -> Iterator[PlanRow]:
        for nodes in self.resources.node_counts():
            ranks = nodes * self.resources.ranks
            whole, batch = self.model.batch, self.model.batch_per_rank
            if whole is not None:
                batch = whole // ranks if whole % ranks == 0 else None
            for strategy in STRATEGIES:
                estimate = estimate_memory(
                    strategy, self.model, ranks, batch or 0, self.precision, self.ddp, self.zero, self.accumulate
                )
                obstacle = f"no: {self.only_ddp}" if strategy != "ddp" and self.only_ddp else self._obstacle(estimate)
                if whole is not None and batch is None:
                    obstacle = f"no: {whole} samples, {ranks} ranks"
                yield PlanRow(nodes, ranks, batch, strategy, estimate, obstacle)

    def _obstacle(self, estimate: MemoryEstimate) -> str | None:
        """Why one rank's ``need`` cannot be; empty if it can, None if nobody knows."""
        memory, host = self.resources.memory, self.resources.host
        if memory is not None and estimate.total + (0 if self.resources.on_gpu else estimate.host) > USABLE_FRACTION * memory:
            return "no"
        if host and max(self.start, self.resources.ranks * estimate.host) > USABLE_FRACTION * host:
            return "no: memory of the node"
        return None if memory is None or estimate.activations is None else ""

    def table(self) -> Table:
        """Bytes per rank, a line for each strategy and number of nodes."""
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

    def advice(self) -> str:
        """Which strategy to take, in one sentence."""
        if self.resources.memory is None:
            key = "gpu_memory (--gpu-memory 80G)" if self.resources.on_gpu else "mem (--mem 64G)"
            return f"To be told what fits, set {key} in the profile."
        fitting = [row for row in self.rows if row.obstacle == ""]
        here = [row for row in fitting if row.nodes == self.resources.nodes]
        if here:
            estimate, memory = format_bytes(here[0].estimate.total), format_bytes(self.resources.memory)
            return f"Take {strategy_flags(here[0].strategy)}: {estimate} of {memory} on each rank."
        more = [row for row in fitting if row.nodes > self.resources.nodes]
        if more:
            here_is = f"{self.resources.nodes} node{'s' if self.resources.nodes > 1 else ''}"
            return f"Nothing fits on {here_is}; take --nodes {more[0].nodes} with {strategy_flags(more[0].strategy)}."
        if not fitting and any(row.obstacle is None for row in self.rows):
            return "Take the first that leaves room for the activations, which are not known."
        return "Nothing fits; take a smaller batch (and accumulate gradients), or activation_checkpointing."


def strategy_flags(strategy: str) -> str:
    """What one types to train that strategy."""
    if strategy == "ddp":
        return "--strategy ddp"
    offload = " --deepspeed.offload_optimizer cpu --deepspeed.offload_param cpu" if strategy.endswith("offload") else ""
    return f"--strategy deepspeed --deepspeed.stage {strategy[4]}{offload}"


def format_bytes(size: int | None) -> str:
    """A number of bytes, to be read."""
    if size is None:
        return "?"
    for unit, name in ((_GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.{0 if size >= 100 * unit else 1}f} {name}"
    return "0" if size == 0 else f"{size} B"
