"""The keys of a config that are lockstep's own, with their types, defaults and help texts. No torch is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from lockstep.core import UsageError

COMMANDS = ("fit", "validate", "test", "predict")


Precision = Literal["auto", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"]


SHARED_CLASSES = {
    "model": ["lockstep.models.Classifier"],
    "data": [f"lockstep.data.{name}" for name in ("CIFAR10", "Digits", "ImageFolder", "MNIST", "Synthetic")],
}
"""Classes that lockstep offers for the keys that take a class."""

RESERVED_TRAINER_KEYS = {
    "strategy": "set strategy (ddp or deepspeed) and its options (ddp.*, deepspeed.*) at the top level",
    "devices": "the launcher decides it (launch/local.py --ranks)",
    "num_nodes": "the launcher decides it (launch/local.py --nodes)",
    "use_distributed_sampler": "the order and sharding of the data are lockstep's",
    "default_root_dir": "everything goes into the run folder; set run.root",
    "barebones": "it would train without logs and checkpoints",
}
"""Arguments of lightning's Trainer that are not for a config, and what to do instead."""


@dataclass
class RunOptions:
    """The run and its folder, <root>/<name>/<id>.

    Args:
        name: What the run is called.
        root: Folder of all runs.
        test_after_fit: Test the final weights when training has ended, where there is a test set.
        hang_timeout_seconds: The least time without progress after which a rank is taken for stuck; it adapts to what is usual.
        max_restarts: How often a job is started again after a crash; being preempted, or out of time, does not count.
    """

    name: str = "run"
    root: Path = Path("runs")
    test_after_fit: bool = True
    hang_timeout_seconds: float = 300.0
    max_restarts: int = 100


@dataclass
class DDPOptions:
    """Options of ``strategy: ddp``; source: torch.nn.parallel.DistributedDataParallel.

    Args:
        static_graph: Promise that every step uses the same parameters in the same way; saves the search for unused ones.
        find_unused_parameters: Search for parameters that a step did not use; needed where the model branches.
        bucket_cap_mb: Gradients are reduced in buckets of this many MiB while backward goes on.
        gradient_as_bucket_view: Let gradients be views into the buckets: one copy of them less in memory.
        gradient_compression: Send gradients as bfloat16 or float16 instead of float32: half the traffic, fewer digits.
    """

    static_graph: bool = False
    find_unused_parameters: bool = False
    bucket_cap_mb: int = 25
    gradient_as_bucket_view: bool = True
    gradient_compression: Literal["none", "bf16", "fp16"] = "none"


@dataclass
class DistributedOptions:
    """Options of the process group, whatever the strategy.

    Args:
        timeout_minutes: How long a collective waits for a rank before it fails.
    """

    timeout_minutes: int = 30


@dataclass
class DeepSpeedOptions:
    """Options of ``strategy: deepspeed``, whose ZeRO shares out what DDP keeps on every rank.

    Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020; the keys are those
    of https://www.deepspeed.ai/docs/config-json.

    Args:
        stage: 1 shares out the optimizer's state, 2 the gradients too, 3 the parameters too.
        offload_optimizer: Compute the optimizer's step on the CPU, and keep its state in the memory there; nvme: stage 3 only.
        offload_param: Keep the parameters there between their uses; stage 3 only.
        nvme_path: Folder that nvme means, on a local disk of each node; several runs may have the same one.
        reduce_bucket_size: Gradients are reduced in buckets of this many elements.
        overlap_comm: Reduce gradients while backward goes on.
        config: File of DeepSpeed's own JSON, for all else; what the trainer knows may not stand in it.
    """

    stage: Literal[1, 2, 3] = 2
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: Path | None = None
    reduce_bucket_size: int = 200_000_000
    overlap_comm: bool = True
    config: Path | None = None


@dataclass
class CheckpointOptions:
    """What is saved below <run folder>/checkpoints, and when; always before a validation and at the end.

    Args:
        every_n_steps: Save after every so many steps as well.
        every_n_minutes: Save after every so many minutes as well.
        async_save: Go on training while the files are written.
        keep_last: How many of the newest are kept.
        monitor: Metric that says which are the best, such as val/accuracy; none keeps the newest alone.
        mode: Whether more or less of it is better.
        save_top_k: How many of the best are kept.
    """

    every_n_steps: int | None = None
    every_n_minutes: float | None = 15.0
    async_save: bool = True
    keep_last: int = 2
    monitor: str | None = None
    mode: Literal["max", "min"] = "max"
    save_top_k: int = 1


@dataclass
class WandbOptions:
    """Where W&B keeps the run; its id is the run's.

    Args:
        mode: ``auto`` is ``online`` where an API key is configured, else ``offline``; WANDB_MODE decides if it is set.
        project: Project.
        entity: User or team; your default one if not set.
        group: Runs of one group are shown together.
        tags: Labels to find the run by.
        notes: A longer text about the run.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "lockstep"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None


@dataclass
class Options:
    """What every run has; beside it a config has ``trainer`` (lightning's), ``model`` and ``data``.

    Args:
        seed_everything: Decides weights, order, augmentation and dropout.
        strategy: How several ranks train together.
        activation_checkpointing: Import paths of classes, such as torchvision.models.vision_transformer.EncoderBlock: the parts
            of the module that are of them keep no activations, and are computed again in backward.
        shared_filesystem: Nodes share their files: prepare_data runs once per job, else per node.
        ckpt_path: Checkpoint, or run folder, to start from, to evaluate or to predict with.
    """

    seed_everything: int = 1
    run: RunOptions = field(default_factory=RunOptions)
    strategy: Literal["ddp", "deepspeed"] = "ddp"
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    ddp: DDPOptions = field(default_factory=DDPOptions)
    deepspeed: DeepSpeedOptions = field(default_factory=DeepSpeedOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    wandb: WandbOptions = field(default_factory=WandbOptions)
    activation_checkpointing: list[str] = field(default_factory=list)
    shared_filesystem: bool = True
    ckpt_path: str | None = None


GROUPS = tuple(field.name for field in fields(Options) if is_dataclass(field.type))
"""The keys of lockstep's own that hold keys themselves."""


def check_ranges(seed_everything: int | None, best: int | None, trainer: Mapping[str, Any]) -> None:
    """Raise the UsageError about a number that is missing or out of range; ``trainer`` has those of lightning, if given."""
    if seed_everything is None or not 0 <= seed_everything < 2**32:
        raise UsageError(f"seed_everything: {seed_everything} must be 0 or more, and less than 2**32.")
    if best is None or best < 1:
        raise UsageError(f"checkpoint.save_top_k: {best} must be 1 or more.")
    for key, least in (("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
        value = trainer.get(key)
        if isinstance(value, int | float) and value < least:
            raise UsageError(f"trainer.{key}: {value} must be {least} or more.")
