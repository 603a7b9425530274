"""What a training step costs: this trainer, a stock lightning Trainer and a hand-written PyTorch DDP loop, side by side.

    python benchmarks/step.py [--ranks 2] [--steps 300] [--rounds 5]

The same model, data, batch, optimizer and ranks; all take turns, round by round, and the median round counts. The
hand-written loop computes nothing but the loss. The stock Trainer logs the loss at every step (``self.log``) to a CSV file;
this trainer counts loss and accuracy at every step, logs them every 50 and checks for NaN. Ratios are to the hand-written loop.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
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

from lockstep.core.world import World
from lockstep.data.sharding import DataSharding
from lockstep.data.synthetic import SyntheticImages
from lockstep.distributed.consensus import Decision, StopConsensus
from lockstep.distributed.process_group import WorldEnvironment, destroy_process_group, init_process_group, local_devices
from lockstep.distributed.ranks import fork_ranks
from lockstep.models.networks import MLP, ConvNet
from lockstep.runs.run import Run
from lockstep.trainer import build
from lockstep.trainer.config_parser import parse_config
from lockstep.trainer.loops import EpochLoop
from lockstep.trainer.session import train

WARM_UP = 30
BATCH = 64
"""Samples of a step on each rank."""
SHAPE = (1, 28, 28)
NETWORKS: dict[str, Any] = {
    "tiny MLP": ("lockstep.models.MLP", {"shape": list(SHAPE), "hidden": [64], "num_classes": 10}),
    "small conv net": ("lockstep.models.ConvNet", {"in_channels": 1, "num_classes": 10, "widths": [16, 32]}),
}


def mark(marks: list[float], step: int, steps: int) -> None:
    """Note the time when the warm-up has ended and when the last step has, on the device too."""
    if step in (WARM_UP, steps):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())


class Clock(Callback):
    """Notes the time at the end of the warm-up and of the last step."""

    marks: ClassVar[list[float]] = []  # of the class: the config makes the callback, and the caller reads them

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        mark(Clock.marks, trainer.global_step, int(trainer.num_training_batches))


def make_network(kind: str) -> nn.Module:
    """The network called ``kind`` in the table."""
    path, arguments = NETWORKS[kind]
    return {"MLP": MLP, "ConvNet": ConvNet}[path.rpartition(".")[2]](**arguments)


def normalized(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) as floats around zero."""
    return images.to(torch.float32).sub_(127.5).mul_(1 / 73.95)


def loader(world: World, steps: int) -> DataLoader[Any]:
    """Enough random images for ``steps`` steps, in whole batches, shared out by torch's own sampler."""
    data = SyntheticImages(steps * BATCH * world.size, SHAPE, 10, seed=0)
    return DataLoader(data, BATCH, sampler=DistributedSampler(data, world.size, world.rank), collate_fn=lambda batch: batch)


def by_hand(world: World, kind: str, steps: int) -> list[float]:
    """A training loop as one writes it without a library."""
    device = local_devices(world, "auto")[world.local_rank]
    init_process_group(world, device, timedelta(minutes=5))
    model = make_network(kind).to(device)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    marks = []
    for step, (images, labels) in enumerate(loader(world, steps), start=1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = nn.functional.cross_entropy(wrapped(normalized(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mark(marks, step, steps)
    destroy_process_group()
    return marks


class Stock(LightningModule):
    """A LightningModule as tutorials write it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.network = make_network(kind)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(normalized(images)), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), "interval": "step"}]


def stock(world: World, kind: str, steps: int) -> list[float]:
    """lightning's Trainer with its own strategy, sampler and logger."""
    devices = local_devices(world, "auto")
    init_process_group(world, devices[world.local_rank], timedelta(minutes=5))
    with tempfile.TemporaryDirectory() as folder:
        strategy: Any = DDPStrategy(
            parallel_devices=devices, cluster_environment=WorldEnvironment(world), gradient_as_bucket_view=True
        )
        stock_trainer = Trainer(
            strategy=strategy if world.size > 1 else "auto",
            max_epochs=1,
            callbacks=[Clock()],
            logger=CSVLogger(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        stock_trainer.fit(Stock(kind), loader(world, steps))
    destroy_process_group()
    return Clock.marks


def lockstep(world: World, kind: str, steps: int) -> list[float]:
    """This trainer, as ``launch/local.py`` would run it."""
    path, arguments = NETWORKS[kind]
    data = {
        "shape": list(SHAPE),
        "classes": 10,
        "batch_size": BATCH * world.size,
        "train_samples": steps * BATCH * world.size,
    }
    keys = [
        *(
            "--model",
            "lockstep.models.Classifier",
            "--model.schedule",
            "constant",
            "--data",
            "lockstep.data.Synthetic",
        ),
        *("--model.network", json.dumps({"class_path": path, "init_args": arguments})),
        *(part for key, value in data.items() for part in (f"--data.{key}", json.dumps(value))),
        *("--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0", "--trainer.enable_checkpointing", "false"),
        *("--trainer.callbacks+=step.Clock", "--run.test_after_fit", "false", "--wandb.mode", "disabled"),
        *("--trainer.precision", "32-true"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        import step  # the module that the config names; this file, run as a script, is another one

        train("fit", *parse_config(keys), world, Run.create(Path(folder), f"bench-{world.rank}"))
    return step.Clock.marks


class NoHang(Callback):
    """Watches over nobody."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def reset(self) -> None:
        """Nothing."""


def bare(world: World, kind: str, steps: int) -> list[float]:
    """This trainer without what makes it stop together, watch itself and keep the order of the data.

    Every way runs in processes of its own, so what is replaced here is replaced nowhere else.
    """
    StopConsensus.poll = lambda self, *_, **__: Decision()
    build.Watchdog = NoHang
    DataSharding.shard = lambda self, loader, name="": plain_order(loader, world)
    return lockstep(world, kind, steps)


def broadcasting(world: World, kind: str, steps: int) -> list[float]:
    """The same, with stock lightning's broadcast at each step."""
    EpochLoop._broadcast_sigterm_tensor = _TrainingEpochLoop._broadcast_sigterm_tensor
    return bare(world, kind, steps)


def plain_order(loader: DataLoader[Any], world: World) -> DataLoader[Any]:
    """A rank's share of ``loader`` by torch's own sampler."""
    sampler: Any = DistributedSampler(loader.dataset, world.size, world.rank)
    return DataLoader(loader.dataset, BATCH, sampler=sampler, collate_fn=loader.collate_fn)


WAYS = {
    "hand-written DDP": by_hand,
    "stock lightning": stock,
    "lockstep": lockstep,
    "… without agreement, watch and order": bare,
    "… and with lightning's broadcast": broadcasting,
}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    table = Table(
        title=f"{options.ranks} ranks, {BATCH} samples each, {options.steps} steps, median of {options.rounds} rounds"
    )
    for column in ("network", "trainer", "ms/step", "samples/s", "ratio"):
        table.add_column(column, justify="left" if column in ("network", "trainer") else "right")
    for kind in NETWORKS:
        found: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(options.rounds):
            for name, way in WAYS.items():
                marks = fork_ranks(
                    lambda world, way=way, kind=kind: way(world, kind, options.steps),
                    1,
                    options.ranks,
                    logs=lambda rank: Path("/dev/null"),
                )[0]
                found[name].append((marks[1] - marks[0]) / (options.steps - WARM_UP))
        base = statistics.median(found["hand-written DDP"])
        for name, rounds in found.items():
            seconds = statistics.median(rounds)
            speed = BATCH * options.ranks / seconds
            table.add_row(kind, name, f"{1000 * seconds:.2f}", f"{speed:,.0f}", f"{seconds / base:.2f}")
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
