"""Time of a training step with lockstep, with a stock Lightning Trainer and with a hand-written PyTorch DDP loop.

    python benchmarks/step.py [--ranks 2] [--steps 300] [--rounds 5] [--networks "tiny MLP" "small conv net"]
    python benchmarks/step.py --ranks 1 --networks ResNet-50 ViT-B/16 --batch-size 256 --precision bf16-mixed --channels-last

All use the same model, data, batch size, ranks and optimizer, which decays no biases. As in a Slurm job, each rank has its own
CPUs; with --unbound, the ranks share them. Images of ImageNet's size are on the device from the start, so that no loader is
measured. The trainers take turns, and the median over the rounds counts. The hand-written loop computes only the loss. The
stock Trainer logs the loss at each step (``self.log``) to a CSV file. lockstep counts loss and accuracy at each step, logs
them every 50 steps and checks for NaN. Ratios are to the first of the trainers, by default the hand-written loop.
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
from contextlib import AbstractContextManager, nullcontext
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
from step_setup import IMAGE_SHAPE, NETWORKS, Setup, as_it_is, normalize
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lockstep.core import World
from lockstep.data.loading import DataSharding
from lockstep.distributed import (
    StopConsensus,
    WorldEnvironment,
    destroy_process_group,
    fork_ranks,
    init_process_group,
    local_devices,
    share_cpus,
)
from lockstep.distributed.consensus import Decision
from lockstep.models.optimizers import parameter_groups
from lockstep.runs import Run
from lockstep.trainer import build
from lockstep.trainer.config_parser import parse_config
from lockstep.trainer.loops import EpochLoop
from lockstep.trainer.session import train

WARM_UP = 30
"""Steps before the measurement."""


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


def make_loader(world: World, setup: Setup, steps: int, device: torch.device) -> DataLoader[Any]:
    """Random images for ``steps`` steps, sharded by torch's own sampler."""
    data = setup.make_data(world, steps, device)
    sampler: DistributedSampler[Any] = DistributedSampler(data, world.size, world.rank)
    return DataLoader(data, setup.batch_size, sampler=sampler, collate_fn=as_it_is)


def train_by_hand(world: World, setup: Setup, steps: int) -> None:
    """Train with a loop as one writes it without a library."""
    device = setup.device(world)
    if device.type == "cpu":
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"  # as in a script that does not import Lightning
    init_process_group(world, device, timedelta(minutes=5))
    model = setup.make_network().to(device, torch.bfloat16 if setup.precision == "bf16-true" else torch.float32)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    kind = torch.bfloat16 if setup.precision == "bf16-true" else torch.float32
    for step, (images, labels) in enumerate(make_loader(world, setup, steps, device), start=1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = normalize(images).to(kind, memory_format=setup.memory_format)
        context: AbstractContextManager[Any] = (
            torch.autocast(device.type, torch.bfloat16) if setup.precision == "bf16-mixed" else nullcontext()
        )
        with context:
            loss = nn.functional.cross_entropy(wrapped(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        StepTimer.record(step, steps)
    destroy_process_group()


class StockClassifier(LightningModule):
    """A LightningModule as in tutorials."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.format, self.network = setup.memory_format, setup.make_network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        images = normalize(images).to(self.dtype, memory_format=self.format)
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(parameter_groups(self, 0.01), lr=1e-3, fused=True)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), "interval": "step"}]


def train_with_lightning(world: World, setup: Setup, steps: int) -> None:
    """Train with Lightning's own Trainer, strategy and logger."""
    devices = local_devices(world, setup.accelerator, "auto", os.environ)
    init_process_group(world, devices[world.local_rank], timedelta(minutes=5))
    strategy: Any = "auto"
    if world.size > 1:
        strategy = DDPStrategy(
            parallel_devices=devices, cluster_environment=WorldEnvironment(world), gradient_as_bucket_view=True
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            strategy=strategy,
            accelerator="cpu" if devices[0].type == "cpu" else "gpu",
            devices=world.local_size,
            precision=setup.precision,
            max_epochs=1,
            callbacks=[StepTimer()],
            logger=CSVLogger(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        trainer.fit(StockClassifier(setup), make_loader(world, setup, steps, devices[world.local_rank]))
    destroy_process_group()


def train_with_lockstep(world: World, setup: Setup, steps: int) -> None:
    """Train as ``launch/local.py`` does."""
    kind, arguments = NETWORKS[setup.network]
    batch_size = setup.batch_size * world.size
    if isinstance(kind, str):
        network: Any = kind
        data: dict[str, Any] = {"data": "step_setup.DeviceData", "data.samples": steps * batch_size}
        data |= {"data.channels_last": setup.channels_last, "model.num_classes": 1000}
    else:
        network = {"class_path": f"lockstep.models.{kind.__name__}", "init_args": arguments}
        data = {"data": "lockstep.data.Synthetic", "data.train_samples": steps * batch_size}
        data |= {"data.shape": IMAGE_SHAPE, "data.classes": 10}
    config: dict[str, Any] = {
        "model": "lockstep.models.Classifier",
        "model.schedule": "constant",
        "model.network": network,
        "model.channels_last": setup.channels_last,
        "model.compile": setup.compile,
        **data,
        "data.batch_size": batch_size,
        "trainer.accelerator": setup.accelerator,
        "trainer.max_epochs": 1,
        "trainer.limit_val_batches": 0,
        "trainer.enable_checkpointing": False,
        "trainer.precision": setup.precision,
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


def train_without_extras(world: World, setup: Setup, steps: int) -> None:
    """Train with lockstep, but without consensus, watchdog and sampling of its own."""
    replace(StopConsensus, "poll", lambda self, *_, **__: Decision())
    replace(build, "Watchdog", NoWatchdog)
    replace(DataSharding, "shard", lambda self, loader, *_, **__: shard_with_torch(loader, world))
    train_with_lockstep(world, setup, steps)


def train_with_broadcast(world: World, setup: Setup, steps: int) -> None:
    """Train in the same way, with stock Lightning's broadcast at each step."""
    replace(EpochLoop, "_broadcast_sigterm_tensor", _TrainingEpochLoop._broadcast_sigterm_tensor)
    train_without_extras(world, setup, steps)


def shard_with_torch(loader: DataLoader[Any], world: World) -> DataLoader[Any]:
    """Shard ``loader`` with torch's own sampler."""
    sampler: DistributedSampler[Any] = DistributedSampler(loader.dataset, world.size, world.rank)
    assert loader.batch_size is not None
    return DataLoader(loader.dataset, loader.batch_size // world.size, sampler=sampler, collate_fn=loader.collate_fn)


TRAINERS: dict[str, Callable[[World, Setup, int], None]] = {
    "hand-written DDP": train_by_hand,
    "stock Lightning": train_with_lightning,
    "lockstep": train_with_lockstep,
    "… without consensus, watchdog, sampling": train_without_extras,
    "… and with Lightning's broadcast": train_with_broadcast,
}


def measure(trainer: str, setup: Setup, ranks: int, steps: int, is_bound: bool = True) -> float:
    """Train in forked ranks and return the seconds per step on rank zero; ``is_bound`` gives each rank its own CPUs."""
    shares = share_cpus(ranks, {"SLURM_CPUS_ON_NODE": str(os.cpu_count())}) if is_bound else None

    def run(world: World) -> tuple[float, float]:
        if shares is not None:
            os.sched_setaffinity(0, shares[world.local_rank])
        TRAINERS[trainer](world, setup, steps)
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
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["tiny MLP", "small conv net"])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--batch-size", type=int, default=64, help="samples per step on each rank")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed", "bf16-true"], default="32-true")
    parser.add_argument("--channels-last", action="store_true", help="images and filters in this memory format")
    parser.add_argument("--compile", action="store_true", help="compile the network")
    parser.add_argument("--unbound", action="store_true", help="let the ranks share all CPUs")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    table = Table(
        title=f"{options.ranks} ranks, {options.batch_size} samples each, {options.steps} steps, "
        f"median of {options.rounds} rounds"
    )
    for column in ("network", "trainer", "ms/step", "samples/s", "ratio"):
        table.add_column(column, justify="left" if column in ("network", "trainer") else "right")
    for network in options.networks:
        how = options.precision, options.channels_last, options.compile, options.accelerator
        setup = Setup(network, options.batch_size, *how)
        seconds: dict[str, list[float]] = {trainer: [] for trainer in options.trainers}
        for _ in range(options.rounds):
            for trainer, rounds in seconds.items():
                rounds.append(measure(trainer, setup, options.ranks, options.steps, not options.unbound))
        medians = {trainer: statistics.median(rounds) for trainer, rounds in seconds.items()}
        for trainer, median in medians.items():
            samples = options.batch_size * options.ranks / median
            ratio = median / medians[options.trainers[0]]
            table.add_row(network, trainer, f"{1000 * median:.2f}", f"{samples:,.0f}", f"{ratio:.2f}")
    Console(width=90).print(table)


if __name__ == "__main__":
    import step  # the config names callbacks of the module `step`, not of `__main__`

    step.main()
