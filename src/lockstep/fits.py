"""Which ways to train fit into the memory of a rank: a table, and one sentence about which to take. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from rich.table import Table

from lockstep.memory import ROOM, WAYS, Footprint, Need, needs
from lockstep.options import DDPOptions, DeepSpeedOptions

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

    def numbers_of_nodes(self) -> list[int]:
        """1, 2, 4 … up to the nodes that were asked for, and at least to 8."""
        powers = [1 << power for power in range(max(8, self.nodes).bit_length())]
        return sorted({*powers, self.nodes})


@dataclass(frozen=True)
class Row:
    """One way to train on one number of nodes.

    Attributes:
        nodes: Nodes.
        ranks: On all of them.
        batch: Samples of a rank in a backward pass; None where they do not divide, or are not known.
        way: One of ``WAYS``.
        need: Bytes of a rank.
        trouble: Why it cannot be, in a few words; empty if it can, None if nobody knows.
    """

    nodes: int
    ranks: int
    batch: int | None
    way: str
    need: Need
    trouble: str | None


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

    model: Footprint
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
    def rows(self) -> list[Row]:
        """All of them, on few nodes first."""
        return list(self._rows())

    def _rows(self) -> Iterator[Row]:
        for nodes in self.resources.numbers_of_nodes():
            ranks = nodes * self.resources.ranks
            whole, batch = self.model.batch, self.model.batch_per_rank
            if whole is not None:
                batch = whole // ranks if whole % ranks == 0 else None
            for way in WAYS:
                need = needs(way, self.model, ranks, batch or 0, self.precision, self.ddp, self.zero, self.accumulate)
                trouble = f"no: {self.only_ddp}" if way != "ddp" and self.only_ddp else self._trouble(need)
                if whole is not None and batch is None:
                    trouble = f"no: {whole} samples, {ranks} ranks"
                yield Row(nodes, ranks, batch, way, need, trouble)

    def _trouble(self, need: Need) -> str | None:
        """Why one rank's ``need`` cannot be; empty if it can, None if nobody knows."""
        memory, host = self.resources.memory, self.resources.host
        if memory is not None and need.total + (0 if self.resources.on_gpu else need.host) > ROOM * memory:
            return "no"
        if host and max(self.start, self.resources.ranks * need.host) > ROOM * host:
            return "no: memory of the node"
        return None if memory is None or need.activations is None else ""

    def table(self) -> Table:
        """Bytes per rank, a line for each way and number of nodes."""
        table = Table(box=None, pad_edge=False)
        table.add_column("nodes × ranks", no_wrap=True)
        table.add_column("batch", justify="right")
        table.add_column("strategy", no_wrap=True)
        for name in ("weights", "gradients", "optimizer", "buffers", "activations", "peak", "in CPU memory"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("fits", no_wrap=True)
        nodes = 0
        for row in self.rows:
            need = row.need
            sizes = (need.weights, need.gradients, need.optimizer, need.buffers, need.activations, need.total, need.host)
            first = (f"{row.nodes} × {self.resources.ranks}", "?" if row.batch is None else str(row.batch))
            fits = {None: "?", "": "yes"}.get(row.trouble, row.trouble)
            table.add_row(*(first if row.nodes != nodes else ("", "")), row.way, *map(text, sizes), fits)
            nodes = row.nodes
        return table

    def advice(self) -> str:
        """Which way to take, in one sentence."""
        if self.resources.memory is None:
            key = "gpu_memory (--gpu-memory 80G)" if self.resources.on_gpu else "mem (--mem 64G)"
            return f"To be told what fits, set {key} in the profile."
        fitting = [row for row in self.rows if row.trouble == ""]
        here = [row for row in fitting if row.nodes == self.resources.nodes]
        if here:
            return f"Take {how(here[0].way)}: {text(here[0].need.total)} of {text(self.resources.memory)} on each rank."
        more = [row for row in fitting if row.nodes > self.resources.nodes]
        if more:
            here_is = f"{self.resources.nodes} node{'s' if self.resources.nodes > 1 else ''}"
            return f"Nothing fits on {here_is}; take --nodes {more[0].nodes} with {how(more[0].way)}."
        if not fitting and any(row.trouble is None for row in self.rows):
            return "Take the first that leaves room for the activations, which are not known."
        return "Nothing fits; take a smaller batch (and accumulate gradients), or activation_checkpointing."


def how(way: str) -> str:
    """What one types to train that way."""
    if way == "ddp":
        return "--strategy ddp"
    offload = " --deepspeed.offload_optimizer cpu --deepspeed.offload_parameters cpu" if way.endswith("offload") else ""
    return f"--strategy deepspeed --deepspeed.stage {way[4]}{offload}"


def text(size: int | None) -> str:
    """A number of bytes, to be read."""
    if size is None:
        return "?"
    for unit, name in ((_GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.{0 if size >= 100 * unit else 1}f} {name}"
    return "0" if size == 0 else f"{size} B"
