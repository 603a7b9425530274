"""Time that training pauses for a save: in the background, in the foreground, and with ``trainer.save_checkpoint``.

    python benchmarks/checkpoint.py [--rounds 5] [--megabytes 10 100 1000]

One process; the state is a weight and its momentum. lockstep flushes a checkpoint to disk, hashes it and reads it back;
``trainer.save_checkpoint`` does none of this. Times are medians; ratios are to ``trainer.save_checkpoint``.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lockstep.checkpoint import CheckpointCallback
from lockstep.core import World
from lockstep.distributed import StopConsensus
from lockstep.trainer.config_parser import parse_config
from lockstep.trainer.session import train

STOCK = "trainer.save_checkpoint"
SAVES = {
    STOCK: ["--trainer.enable_checkpointing=false", "--trainer.callbacks+=checkpoint.StockCheckpoint"],
    "lockstep, background": ["--checkpoint.every_n_steps=1"],
    "lockstep, foreground": ["--checkpoint.every_n_steps=1", "--checkpoint.async_save=false"],
}


class LargeModel(LightningModule):
    """A model whose weight takes half of ``megabytes``; its momentum takes the other half."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(megabytes * 2**20 // 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.weight[:8] * batch[0].mean()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class RandomNumbers(LightningDataModule):
    """64 batches of one number."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(64, 1)), batch_size=1)


class SaveTimer:
    """A context manager that times a save.

    Attributes:
        seconds: Of the class, as the trainer makes the callbacks that save.
    """

    seconds: ClassVar[list[float]] = []

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


class StockCheckpoint(Callback):
    """Save at each step as Lightning does."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        with tempfile.TemporaryDirectory(dir=trainer.default_root_dir) as folder, SaveTimer():
            trainer.save_checkpoint(Path(folder) / "model.ckpt")


def timed_save(callback: CheckpointCallback, trainer: Trainer) -> None:
    """Time ``CheckpointCallback.save``, without the save before it that may still be in the background."""
    if callback.writer is not None:
        callback.writer.wait_until_finished(StopConsensus(World()))
        with SaveTimer():
            save(callback, trainer)


save = CheckpointCallback.save


def measure(arguments: Sequence[str], megabytes: int, rounds: int) -> float:
    """Train ``rounds`` steps with a save after each, and return the median seconds of a save."""
    SaveTimer.seconds.clear()
    with tempfile.TemporaryDirectory() as folder:
        keys = [
            *("--model=checkpoint.LargeModel", f"--model.megabytes={megabytes}", "--data=checkpoint.RandomNumbers"),
            *(f"--trainer.max_steps={rounds}", "--wandb.mode=disabled", f"--run.root={folder}"),
        ]
        train("fit", parse_config([*keys, *arguments]), World())
    return statistics.median(SaveTimer.seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    CheckpointCallback.save = timed_save  # type: ignore[assignment, method-assign]
    table = Table("state", "save", "training pauses", f"× {STOCK}", box=None)
    for megabytes in options.megabytes:
        medians = {name: measure(keys, megabytes, options.rounds) for name, keys in SAVES.items()}
        for name, median in medians.items():
            table.add_row(f"{megabytes} MB", name, f"{1000 * median:.0f} ms", f"{median / medians[STOCK]:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    import checkpoint  # the config names classes of the module `checkpoint`, not of `__main__`

    checkpoint.main()
