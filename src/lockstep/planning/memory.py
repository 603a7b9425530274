"""What fits: the bytes that a rank needs to train a model, with DDP and with each stage of ZeRO. No torch here, formulas alone.

Sources. [R] Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020, section 3 and
figure 1: what is kept, and what each stage shares out. [D] DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py:
float32 master weights, the buckets of ``setup_buckets``, and the defaults of zero/config.py for what stage 3
keeps whole. [T] torch.nn.parallel.DistributedDataParallel: gradients are views into its buckets, or copied there.
``benchmarks/memory.py`` compares them with what ranks really hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lockstep.config import DDPOptions, DeepSpeedOptions, deepspeed_config

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
"""Strategies, the one that sends least first: the volume is that of DDP up to stage 2, half as much again with 3 [R, 7]."""


USABLE_FRACTION = 0.9
"""The part of a device's memory that may be planned; the rest is for CUDA's context, NCCL and fragments."""


_FLOAT = 4


_BYTES = {"16": 2, "bf16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Activations:
    """What is alive at the peak of forward and backward beside weights and gradients, for batches of any size.

    Attributes:
        fixed: Bytes, whatever the batch, such as weights that autocast has cast.
        each: Bytes for each sample.
    """

    fixed: float
    each: float

    def of(self, batch: float) -> int:
        """Bytes for ``batch`` samples."""
        return round(self.fixed + self.each * batch)


@dataclass(frozen=True)
class ModelProfile:
    """What of a model, its optimizer and its data decides how much memory it needs.

    Attributes:
        numels: Elements of each parameter.
        groups: Elements of each one that the optimizer steps, by its groups.
        buffers: Bytes of buffers.
        state: Bytes that the optimizer keeps for an element of a parameter, by the bytes of such an element.
        is_fused: Whether the optimizer's step needs no memory; else it is taken to copy once all that it steps, as torch's
            foreach implementations do with a root or with weight decay.
        activations: By what computes, ``ddp`` or ``zero``, where they could be measured.
        batch: Samples of a backward pass over all ranks; None if each rank has its own number, ``batch_per_rank``.
        batch_per_rank: Samples of a backward pass on each rank, where they do not depend on the ranks.
    """

    numels: Sequence[int]
    groups: Sequence[Sequence[int]]
    buffers: int
    state: Mapping[int, float]
    is_fused: bool
    activations: Mapping[str, Activations]
    batch: int | None = None
    batch_per_rank: int | None = None

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(self.numels)

    @property
    def trainable(self) -> int:
        """Elements of all parameters that the optimizer steps."""
        return sum(map(sum, self.groups))

    def touched(self, ranks: int) -> int:
        """Elements of all parameters of which the optimizer's part of a rank has any; the most of all ranks."""
        most = 0
        for rank in range(ranks):
            own = 0
            for numels in self.groups:
                part = -(-sum(numels) // ranks)
                begin, at = rank * part, 0
                for numel in numels:
                    own += numel if at < begin + part and at + numel > begin else 0
                    at += numel
            most = max(most, own)
        return most


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs.

    Attributes:
        weights, gradients, optimizer: What is kept from step to step; float32 master weights are the optimizer's.
        buffers: Of communication, and with stage 3 the parameters that are whole while they are needed.
        activations: At the peak; None if they could not be measured.
        step: What the optimizer's step needs beside all that, when activations are gone.
        start: The least that must fit when training begins.
        host: What is kept in the memory of the CPU.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int | None
    step: int = 0
    start: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """The peak, on the device."""
        kept = self.weights + self.gradients + self.optimizer
        return max(kept + max(self.buffers + (self.activations or 0), self.step), self.start)


def estimate_memory(
    strategy: str,
    model: ModelProfile,
    ranks: int,
    batch: float,
    precision: str,
    ddp: DDPOptions,
    zero: DeepSpeedOptions,
    accumulate: int = 1,
) -> MemoryEstimate:
    """The bytes of one of ``ranks``.

    Args:
        strategy: One of ``WAYS``.
        model: The model and its optimizer.
        ranks: In the whole world.
        batch: Samples of a backward pass on this rank.
        precision: As in lightning's Trainer, ``auto`` resolved.
        ddp: Options of DDP.
        zero: Options of DeepSpeed; the stage and the places of ``strategy`` stand in for its own.
        accumulate: Batches of a step.
    """
    bits, _, kind = precision.partition("-")
    if strategy == "ddp":
        return _estimate_ddp(model, ranks, batch, _FLOAT if kind == "mixed" else _BYTES[bits], ddp)
    place: Any = "cpu" if strategy == "zero3_offload" else "none"
    stage: Any = int(strategy[4])
    options = replace(zero, stage=stage, offload_optimizer=place, offload_param=place, nvme_path=None)
    return _estimate_zero(model, ranks, batch, min(_FLOAT, _BYTES[bits]), options, accumulate)


def _activations(model: ModelProfile, strategy: str, batch: float) -> int | None:
    measured = model.activations.get(strategy)
    return None if measured is None else measured.of(batch)


def _estimate_ddp(model: ModelProfile, ranks: int, batch: float, element: int, options: DDPOptions) -> MemoryEstimate:
    copies = 1 if options.gradient_as_bucket_view or ranks == 1 else 2  # [T]
    return MemoryEstimate(
        weights=element * model.parameters + model.buffers,
        gradients=element * model.trainable,
        optimizer=round(model.state[element] * model.trainable),
        buffers=(copies - 1) * element * model.trainable,
        activations=_activations(model, "ddp", batch),
        step=0 if model.is_fused else element * model.trainable,
    )


def _estimate_zero(
    model: ModelProfile, ranks: int, batch: float, element: int, options: DeepSpeedOptions, accumulate: int
) -> MemoryEstimate:
    json: Mapping[str, Any] = deepspeed_config(options)["zero_optimization"]
    stage, offload = options.stage, options.offload_optimizer != "none"
    own = -(-model.trainable // ranks)
    optimizer = round((_FLOAT + model.state[_FLOAT]) * own)  # with master weights, also of weights that are float32 [D]
    copies = 2 if stage < 3 and options.overlap_comm else 1
    bucket = copies * element * min(int(json["reduce_bucket_size"]), model.trainable)
    gradients = element * (own if stage == 3 else model.touched(ranks))  # of whole parameters, with stages 1 and 2 [D]
    if stage == 1 and (accumulate > 1 or not options.overlap_comm):
        gradients = element * model.trainable  # until the last batch of a step, each rank has all of them
    weights, live, start = element * model.parameters, 0, 0
    if stage == 3:
        threshold = int(json.get("stage3_param_persistence_threshold", 100_000))
        small = sum(numel for numel in model.numels if numel < threshold)
        most = int(json.get("stage3_max_live_parameters", 1_000_000_000))
        start = weights  # DeepSpeed moves a model to the device before it shares it out
        live = element * min(model.parameters - small, most)
        weights = element * (-(-model.parameters // ranks) + small)
    host = 0
    if offload:
        host = optimizer + (_FLOAT + element * (stage == 3)) * own  # with gradients in float32 [D]
        optimizer = gradients = 0
    if options.offload_param != "none":
        host += element * -(-model.parameters // ranks)
        weights -= element * -(-model.parameters // ranks)
    return MemoryEstimate(
        weights=weights + model.buffers,
        gradients=gradients,
        optimizer=optimizer,
        buffers=bucket + live,
        activations=_activations(model, "zero", batch),
        step=0 if offload else _FLOAT * own * (1 if model.is_fused else 2),  # gradients in float32 [D]
        start=start,
        host=host,
    )
