"""lockstep's own config keys: types, defaults and help texts. Lightning's and the classes' keys come from their sources."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

COMMANDS = ("fit", "validate", "test", "predict")

Precision = Literal[
    "auto", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "16", "bf16", "32", "64", 16, 32, 64
]

FULL_PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
"""What Lightning means by the short names of ``trainer.precision``."""

SHARED_CLASSES = {
    "model": ["lockstep.models.Classifier"],
    "data": [f"lockstep.data.{name}" for name in ("CIFAR10", "Digits", "ImageFolder", "MNIST", "Shards", "Synthetic")],
}
"""lockstep's own classes for the keys that take a class."""

OPTIMIZERS = ("adamw", "sgd")
"""Short names of ``model.optimizer``."""

RESERVED_TRAINER_KEYS = {
    "strategy": "set strategy (ddp or deepspeed) and its options (ddp.*, deepspeed.*) at the top level",
    "devices": "use the launcher's flag --ranks (or --ranks-per-node on Slurm)",
    "num_nodes": "use the launcher's flag --nodes",
    "use_distributed_sampler": "lockstep orders and shards the data itself",
    "default_root_dir": "set run.root, the root of all run folders",
    "barebones": "it would train without logs and checkpoints",
}
"""Arguments of Lightning's Trainer that a config cannot set, and what to do instead."""

REFUSED_TRAINER_CLASSES = {
    "LearningRateFinder": "takes trial steps whose losses are those of rank zero alone, so its rate would depend on "
    "the number of ranks; find the rate with Lightning's Tuner in a script of your own, and set it in model",
    "BatchSizeFinder": "sets the size that fits the memory of this machine, so that training would depend on the machine; see "
    "what fits with --plan, and set the size in data",
    "WandbLogger": "would log every row to W&B again, as trainer.logger is a WandbLogger in every run; remove it and set wandb",
}
"""Callbacks and loggers of Lightning that a run cannot have, and why."""


@dataclass
class RunOptions:
    """The run and its folder, <root>/<name>/<id>.

    Args:
        name: Name of the run.
        root: Folder of all runs.
        test_after_fit: Test the final weights after training, if the data has a test set.
        hang_timeout_seconds: Minimum time without progress before a rank counts as hung; it adapts to the usual step time.
        max_restarts: Maximum number of restarts after a crash; preemptions and time limits do not count.
        warm_restarts: Restart failed ranks from the agents of the nodes, without srun and imports; false always uses srun.
    """

    name: str = "run"
    root: Path = Path("runs")
    test_after_fit: bool = True
    hang_timeout_seconds: float = 300.0
    max_restarts: int = 100
    warm_restarts: bool = True


@dataclass
class DDPOptions:
    """Options of ``strategy: ddp``; source: torch.nn.parallel.DistributedDataParallel.

    Args:
        static_graph: Promise that every step uses the same parameters in the same way; skips the search for unused ones.
        find_unused_parameters: Search for parameters that a step did not use; needed if the model has branches.
        bucket_cap_mb: Size of a gradient bucket in MiB; buckets are all-reduced during backward.
        gradient_as_bucket_view: Make gradients views into the buckets; saves one copy of the gradients in memory.
        gradient_compression: All-reduce gradients in bfloat16 or float16: half the traffic, lower precision.
    """

    static_graph: bool = False
    find_unused_parameters: bool = False
    bucket_cap_mb: int = 25
    gradient_as_bucket_view: bool = True
    gradient_compression: Literal["none", "bf16", "fp16"] = "none"


@dataclass
class DistributedOptions:
    """Options of the process group, for every strategy.

    Args:
        timeout_minutes: Time that a collective waits for all ranks before it fails.
        backend: ``auto`` is nccl on GPUs and gloo on CPUs. With gloo and accelerator gpu, ranks may share a GPU: slow,
            for tests of several ranks on one GPU; strategy ddp only.
    """

    timeout_minutes: int = 30
    backend: Literal["auto", "nccl", "gloo"] = "auto"


@dataclass
class DeepSpeedOptions:
    """Options of ``strategy: deepspeed``, which shards with ZeRO what DDP replicates on every rank.

    Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020; keys as in
    https://www.deepspeed.ai/docs/config-json.

    Args:
        stage: 1 shards the optimizer state, 2 also the gradients, 3 also the parameters.
        offload_optimizer: Run the optimizer step on the CPU and keep its state in CPU memory, or on NVMe (stage 3 only).
        offload_param: Keep parameters in CPU memory or on NVMe between uses; stage 3 only.
        nvme_path: Folder for nvme on a local disk of each node; several runs may share it.
        reduce_bucket_size: Number of elements in a gradient bucket.
        overlap_comm: Reduce gradients during backward.
        config: DeepSpeed JSON file with further keys; it cannot set what other keys of this config set.
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
    """Checkpoints in <run folder>/checkpoints. One is always saved before a validation and at the end.

    Args:
        every_n_steps: Also save every N steps.
        every_n_minutes: Also save every N minutes.
        async_save: Continue training while the files are written; with offload to NVMe it waits, as a copy may not fit into
            memory.
        timeout_seconds: Time that a save may take in addition to its bytes at min_mb_per_second. After it, the disk of the
            rank whose files are missing counts as hung, and the attempt ends.
        min_mb_per_second: Lowest rate in MB per second at which all ranks together write a checkpoint.
        keep_last: Number of newest checkpoints to keep.
        monitor: Metric that ranks checkpoints, such as val/accuracy; null keeps only the newest.
        mode: Whether a higher (max) or lower (min) metric is better.
        save_top_k: Number of best checkpoints to keep.
    """

    every_n_steps: int | None = None
    every_n_minutes: float | None = 15.0
    async_save: bool = True
    timeout_seconds: float = 120.0
    min_mb_per_second: float = 50.0
    keep_last: int = 2
    monitor: str | None = None
    mode: Literal["max", "min"] = "max"
    save_top_k: int = 1


@dataclass
class WandbOptions:
    """The W&B run, which has the id of the run.

    Args:
        mode: ``auto`` takes WANDB_MODE if it is set, else is ``online`` if an API key is configured, else ``offline``.
        project: W&B project.
        entity: User or team; null uses your default entity.
        group: Group of the run; W&B shows the runs of a group together.
        tags: Tags of the run.
        notes: Longer description of the run.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "lockstep"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None


@dataclass
class Options:
    """lockstep's own keys of a config, beside ``trainer`` (Lightning's), ``model`` and ``data``.

    Args:
        seed_everything: Seed of initial weights, data order, augmentation and dropout; true draws one, which config.yaml shows.
        strategy: Distributed strategy.
        tensorboard: Also write the metrics as a TensorBoard event file, in <run folder>/tensorboard.
        activation_checkpointing: Import paths of module classes, such as torchvision.models.vision_transformer.EncoderBlock.
            Modules of these classes do not store activations; backward recomputes them.
        shared_filesystem: Whether nodes share files: prepare_data then runs once per job, else once per node.
        ckpt_path: Checkpoint or run folder to start from, evaluate or predict with.
    """

    seed_everything: int | bool = 1
    run: RunOptions = field(default_factory=RunOptions)
    strategy: Literal["ddp", "deepspeed"] = "ddp"
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    ddp: DDPOptions = field(default_factory=DDPOptions)
    deepspeed: DeepSpeedOptions = field(default_factory=DeepSpeedOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    wandb: WandbOptions = field(default_factory=WandbOptions)
    tensorboard: bool = False
    activation_checkpointing: list[str] = field(default_factory=list)
    shared_filesystem: bool = True
    ckpt_path: str | None = None
