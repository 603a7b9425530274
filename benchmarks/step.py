"""Time of a training step with lockstep, with a stock Lightning Trainer and with a hand-written PyTorch DDP loop.

    python benchmarks/step.py [--ranks 2] [--steps 300] [--rounds 5] [--networks "tiny MLP" "small conv net"]

All use the same model, data, batch size, ranks and optimizer, which decays no biases. They take turns, and the median over
the rounds counts. The hand-written loop computes only the loss. The stock Trainer logs the loss at each step (``self.log``) to
a CSV file. lockstep counts loss and accuracy at each step, logs them every 50 steps and checks for NaN. Ratios are to the
hand-written loop.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lockstep.core import World
from lockstep.data.loading import DataSharding
from lockstep.data.synthetic import SyntheticImages
from lockstep.distributed import (
    StopConsensus,
    WorldEnvironment,
    destroy_process_group,
    fork_ranks,
    init_process_group,
    local_devices,
)
from lockstep.distributed.consensus import Decision
from lockstep.models.networks import MLP, ConvNet
from lockstep.models.optimizers import parameter_groups
from lockstep.runs import Run
from lockstep.trainer import build
from lockstep.trainer.config_parser import parse_config
from lockstep.trainer.loops import EpochLoop
from lockstep.trainer.session import train

WARM_UP = 30
"""Steps before the measurement."""
BATCH_SIZE = 64
"""Samples per step on each rank."""
IMAGE_SHAPE = (1, 28, 28)
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "tiny MLP": (MLP, {"shape": IMAGE_SHAPE, "hidden": [64], "num_classes": 10}),
    "small conv net": (ConvNet, {"in_channels": 1, "num_classes": 10, "widths": [16, 32]}),
}


class StepTimer(Callback):
    """Record when the warm-up ends and when the last step ends.

    Attributes:
        timestamps: Of the class, as the trainer makes the instance.
    """

    timestamps: ClassVar[list[float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.record(trainer.global_step, int(trainer.num_training_batches))

    @classmethod
    def record(cls, step: int, steps: int) -> None:
        """Record the time after ``step`` of ``steps``, when the device has finished."""
        if step in (WARM_UP, steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            cls.timestamps.append(time.perf_counter())


def make_network(name: str) -> nn.Module:
    """The network that the table calls ``name``."""
    cls, arguments = NETWORKS[name]
    return cls(**arguments)


def normalize(images: Tensor) -> Tensor:
    """Convert uint8 images (B, C, H, W) to floats around zero."""
    return images.to(torch.float32).sub_(127.5).mul_(1 / 73.95)


def make_loader(world: World, steps: int) -> DataLoader[Any]:
    """Random images for ``steps`` steps, sharded by torch's own sampler."""
    data = SyntheticImages(steps * BATCH_SIZE * world.size, IMAGE_SHAPE, 10, seed=0)
    sampler: DistributedSampler[Any] = DistributedSampler(data, world.size, world.rank)
    return DataLoader(data, BATCH_SIZE, sampler=sampler, collate_fn=lambda batch: batch)


def train_by_hand(world: World, network: str, steps: int) -> None:
    """Train with a loop as one writes it without a library."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"  # as in a script that does not import Lightning
    device = local_devices(world, "auto", "auto", os.environ)[world.local_rank]
    init_process_group(world, device, timedelta(minutes=5))
    model = make_network(network).to(device)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for step, (images, labels) in enumerate(make_loader(world, steps), start=1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = nn.functional.cross_entropy(wrapped(normalize(images)), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        StepTimer.record(step, steps)
    destroy_process_group()


class StockClassifier(LightningModule):
    """A LightningModule as in tutorials."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.network = make_network(network)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(normalize(images)), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(parameter_groups(self, 0.01), lr=1e-3, fused=True)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), "interval": "step"}]


def train_with_lightning(world: World, network: str, steps: int) -> None:
    """Train with Lightning's own Trainer, strategy and logger."""
    devices = local_devices(world, "auto", "auto", os.environ)
    init_process_group(world, devices[world.local_rank], timedelta(minutes=5))
    strategy: Any = "auto"
    if world.size > 1:
        strategy = DDPStrategy(
            parallel_devices=devices, cluster_environment=WorldEnvironment(world), gradient_as_bucket_view=True
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            strategy=strategy,
            max_epochs=1,
            callbacks=[StepTimer()],
            logger=CSVLogger(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        trainer.fit(StockClassifier(network), make_loader(world, steps))
    destroy_process_group()


def train_with_lockstep(world: World, network: str, steps: int) -> None:
    """Train as ``launch/local.py`` does."""
    cls, arguments = NETWORKS[network]
    config: dict[str, Any] = {
        "model": "lockstep.models.Classifier",
        "model.schedule": "constant",
        "model.network": {"class_path": f"lockstep.models.{cls.__name__}", "init_args": arguments},
        "data": "lockstep.data.Synthetic",
        "data.shape": IMAGE_SHAPE,
        "data.classes": 10,
        "data.batch_size": BATCH_SIZE * world.size,
        "data.train_samples": steps * BATCH_SIZE * world.size,
        "trainer.max_epochs": 1,
        "trainer.limit_val_batches": 0,
        "trainer.enable_checkpointing": False,
        "trainer.precision": "32-true",
        "trainer.callbacks+": "step.StepTimer",
        "run.test_after_fit": False,
        "wandb.mode": "disabled",
    }
    keys = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in config.items()]
    with tempfile.TemporaryDirectory() as folder:
        train("fit", parse_config(keys), world, Run.create(Path(folder), f"bench-{world.rank}"))


class NoWatchdog(Callback):
    """Replaces the watchdog."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def reset(self) -> None:
        """Do nothing."""


def replace(owner: Any, name: str, new: Any) -> None:
    """Replace an attribute, which must exist; the benchmark runs each training in its own processes."""
    assert hasattr(owner, name), f"{owner} has no {name}"
    setattr(owner, name, new)


def train_without_extras(world: World, network: str, steps: int) -> None:
    """Train with lockstep, but without consensus, watchdog and sampling of its own."""
    replace(StopConsensus, "poll", lambda self, *_, **__: Decision())
    replace(build, "Watchdog", NoWatchdog)
    replace(DataSharding, "shard", lambda self, loader, *_, **__: shard_with_torch(loader, world))
    train_with_lockstep(world, network, steps)


def train_with_broadcast(world: World, network: str, steps: int) -> None:
    """Train in the same way, with stock Lightning's broadcast at each step."""
    replace(EpochLoop, "_broadcast_sigterm_tensor", _TrainingEpochLoop._broadcast_sigterm_tensor)
    train_without_extras(world, network, steps)


def shard_with_torch(loader: DataLoader[Any], world: World) -> DataLoader[Any]:
    """Shard ``loader`` with torch's own sampler."""
    sampler: DistributedSampler[Any] = DistributedSampler(loader.dataset, world.size, world.rank)
    return DataLoader(loader.dataset, BATCH_SIZE, sampler=sampler, collate_fn=loader.collate_fn)


TRAINERS: dict[str, Callable[[World, str, int], None]] = {
    "hand-written DDP": train_by_hand,
    "stock Lightning": train_with_lightning,
    "lockstep": train_with_lockstep,
    "… without consensus, watchdog, sampling": train_without_extras,
    "… and with Lightning's broadcast": train_with_broadcast,
}


def measure(trainer: str, network: str, ranks: int, steps: int) -> float:
    """Train in forked ranks and return the seconds per step on rank zero."""

    def run(world: World) -> tuple[float, float]:
        TRAINERS[trainer](world, network, steps)
        begin, end = StepTimer.timestamps
        return begin, end

    begin, end = fork_ranks(run, 1, ranks, logs=lambda rank: Path("/dev/null"))[0]
    return (end - begin) / (steps - WARM_UP)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help=f"more than the {WARM_UP} steps of the warm-up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    table = Table(
        title=f"{options.ranks} ranks, {BATCH_SIZE} samples each, {options.steps} steps, median of {options.rounds} rounds"
    )
    for column in ("network", "trainer", "ms/step", "samples/s", "ratio"):
        table.add_column(column, justify="left" if column in ("network", "trainer") else "right")
    for network in options.networks:
        seconds: dict[str, list[float]] = {trainer: [] for trainer in TRAINERS}
        for _ in range(options.rounds):
            for trainer, rounds in seconds.items():
                rounds.append(measure(trainer, network, options.ranks, options.steps))
        medians = {trainer: statistics.median(rounds) for trainer, rounds in seconds.items()}
        for trainer, median in medians.items():
            samples = BATCH_SIZE * options.ranks / median
            ratio = median / medians["hand-written DDP"]
            table.add_row(network, trainer, f"{1000 * median:.2f}", f"{samples:,.0f}", f"{ratio:.2f}")
    Console(width=90).print(table)


if __name__ == "__main__":
    import step  # the config names callbacks of the module `step`, not of `__main__`

    step.main()
