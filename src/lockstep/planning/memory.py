"""Formulas for the bytes that a rank needs to train a model, with DDP and with each stage of ZeRO.

Sources. [R] Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020, section 3 and
figure 1: what ranks keep, and what each stage shards. [D] DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py:
float32 master weights, the buckets of ``setup_buckets``, and zero/config.py for the defaults of stage 3.
[T] torch.nn.parallel.DistributedDataParallel: gradients are views into its buckets, or copied there.
``benchmarks/memory.py`` compares the formulas with the memory of real ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from lockstep.config import DDPOptions, DeepSpeedOptions, deepspeed_config

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
"""Strategies by communication volume: up to stage 2 it equals that of DDP, stage 3 sends 50 % more [R, 7]."""

_FLOAT = 4
_BYTES = {"16": 2, "bf16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a run that decide how much memory it needs.

    Attributes:
        precision: As in Lightning's Trainer, with ``auto`` resolved.
        deepspeed: The strategy decides on its stage and offload.
        accumulate_grad_batches: Backward passes per optimizer step.
    """

    precision: str
    ddp: DDPOptions = field(default_factory=DDPOptions)
    deepspeed: DeepSpeedOptions = field(default_factory=DeepSpeedOptions)
    accumulate_grad_batches: int = 1


@dataclass(frozen=True)
class Activations:
    """Bytes of activations at the peak of forward and backward, as a linear function of the batch size."""

    fixed: float  # such as weights that autocast has cast
    per_sample: float

    def for_batch(self, batch: float) -> int:
        """Bytes for ``batch`` samples."""
        return round(self.fixed + self.per_sample * batch)


@dataclass(frozen=True)
class ModelProfile:
    """Everything in a model, its optimizer and its data that decides how much memory a rank needs.

    Attributes:
        numels: Number of elements of each parameter.
        group_numels: Number of elements of each parameter that the optimizer steps, by parameter group.
        buffers: Bytes of buffers.
        optimizer_bytes: Bytes of optimizer state per element, by the bytes of the element.
        is_fused: Whether the optimizer's step needs no extra memory. Otherwise one copy of all stepped parameters is assumed,
            as torch's foreach implementations make for a root or for weight decay.
        activations: By ``ddp`` or ``zero``; a key is missing where they could not be measured.
        global_batch: Samples of a backward pass over all ranks; None if each rank has its own number.
        batch_per_rank: Samples of a backward pass on each rank, where ``global_batch`` is None.
    """

    numels: Sequence[int]
    group_numels: Sequence[Sequence[int]]
    buffers: int
    optimizer_bytes: Mapping[int, float]
    is_fused: bool
    activations: Mapping[str, Activations] = field(default_factory=dict)
    global_batch: int | None = None
    batch_per_rank: int | None = None

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(self.numels)

    @property
    def trainable(self) -> int:
        """Number of elements of all parameters that the optimizer steps."""
        return sum(map(sum, self.group_numels))

    def batch_on(self, ranks: int) -> int | None:
        """Samples of a backward pass on each of ``ranks``; None if unknown, or if the global batch is not divisible."""
        if self.global_batch is None:
            return self.batch_per_rank
        return None if self.global_batch % ranks else self.global_batch // ranks

    def max_numel_in_shard(self, ranks: int) -> int:
        """Number of elements of all parameters of which a rank's optimizer shard has a part; the maximum over ranks."""
        totals = [0] * ranks
        for numels in self.group_numels:
            shard = max(1, -(-sum(numels) // ranks))
            for numel, end in zip(numels, accumulate(numels), strict=True):
                for rank in range((end - numel) // shard, -(-end // shard)):
                    totals[rank] += numel
        return max(totals)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs.

    Attributes:
        weights, gradients, optimizer: Kept from step to step; float32 master weights count as the optimizer's.
        buffers: For communication; with stage 3 also parameters gathered for use.
        activations: At the peak; None if unknown.
        step: Extra bytes of the optimizer's step, when activations are freed.
        startup: Least bytes that must fit when training starts.
        host: Bytes in CPU memory.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int | None
    step: int = 0
    startup: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Peak bytes on the device."""
        kept = self.weights + self.gradients + self.optimizer
        return max(kept + max(self.buffers + (self.activations or 0), self.step), self.startup)


def estimate_memory(strategy: str, model: ModelProfile, ranks: int, batch: float, options: TrainingOptions) -> MemoryEstimate:
    """Estimate the bytes of each of ``ranks`` with one of ``STRATEGIES`` and ``batch`` samples in its backward pass."""
    bits, _, kind = options.precision.partition("-")
    if strategy == "ddp":
        element = _FLOAT if kind == "mixed" else _BYTES[bits]
        has_copies = ranks > 1 and not options.ddp.gradient_as_bucket_view  # [T]
        return MemoryEstimate(
            weights=element * model.parameters + model.buffers,
            gradients=element * model.trainable,
            optimizer=round(model.optimizer_bytes[element] * model.trainable),
            buffers=element * model.trainable if has_copies else 0,
            activations=_activations(model, "ddp", batch),
            step=0 if model.is_fused else element * model.trainable,
        )
    device: Any = "cpu" if strategy == "zero3_offload" else "none"
    stage: Any = int(strategy.removeprefix("zero")[0])
    zero = replace(options.deepspeed, stage=stage, offload_optimizer=device, offload_param=device, nvme_path=None)
    return _estimate_zero(model, ranks, batch, zero, min(_FLOAT, _BYTES[bits]), options.accumulate_grad_batches)


def _activations(model: ModelProfile, strategy: str, batch: float) -> int | None:
    measured = model.activations.get(strategy)
    return None if measured is None else measured.for_batch(batch)


def _estimate_zero(
    model: ModelProfile, ranks: int, batch: float, options: DeepSpeedOptions, element: int, accumulate: int
) -> MemoryEstimate:
    """Estimate the bytes of a rank with ZeRO; ``element`` is the bytes of a weight, ``accumulate`` the batches of a step."""
    settings: Mapping[str, Any] = deepspeed_config(options)["zero_optimization"]
    stage, is_offloaded = options.stage, options.offload_optimizer != "none"
    shard = -(-model.trainable // ranks)
    optimizer = round((_FLOAT + model.optimizer_bytes[_FLOAT]) * shard)  # with master weights, also of float32 weights [D]
    copies = 2 if stage < 3 and options.overlap_comm else 1
    bucket = copies * element * min(int(settings["reduce_bucket_size"]), model.trainable)
    gradients = element * (shard if stage == 3 else model.max_numel_in_shard(ranks))  # stages 1, 2: whole parameters [D]
    if stage == 1 and (accumulate > 1 or not options.overlap_comm):
        gradients = element * model.trainable  # each rank has all gradients until the last batch of a step
    weights, gathered, startup = element * model.parameters, 0, 0
    weight_shard = element * -(-model.parameters // ranks)
    if stage == 3:
        threshold = int(settings.get("stage3_param_persistence_threshold", 100_000))
        persistent = sum(numel for numel in model.numels if numel < threshold)
        max_live = int(settings.get("stage3_max_live_parameters", 1_000_000_000))
        startup = weights  # DeepSpeed moves the whole model to the device before it shards it
        gathered = element * min(model.parameters - persistent, max_live)
        weights = weight_shard + element * persistent
    host = 0
    if is_offloaded:
        host = optimizer + (_FLOAT + element * (stage == 3)) * shard  # with float32 gradients [D]
        optimizer = gradients = 0
    if options.offload_param != "none":
        host += weight_shard
        weights -= weight_shard
    return MemoryEstimate(
        weights=weights + model.buffers,
        gradients=gradients,
        optimizer=optimizer,
        buffers=bucket + gathered,
        activations=_activations(model, "zero", batch),
        step=0 if is_offloaded else _FLOAT * shard * (1 if model.is_fused else 2),  # float32 gradients [D]
        startup=startup,
        host=host,
    )
