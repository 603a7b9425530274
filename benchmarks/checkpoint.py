"""How long training stands still for a save: in the background, in the foreground, and with ``trainer.save_checkpoint``.

    python benchmarks/checkpoint.py [--rounds 5] [--megabytes 10 100 1000]

One process; the state is a weight and its momentum. Lockstep's saves are flushed to disk, hashed and read back; lightning's
is neither. Seconds are medians; ratios are to ``trainer.save_checkpoint``.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lockstep.checkpoint.callback import CheckpointCallback
from lockstep.core.world import World
from lockstep.trainer.config_parser import parse_config
from lockstep.trainer.session import train

seconds: dict[str, list[float]] = {}


class Heavy(LightningModule):
    """A weight of half of ``megabytes``; the other half is its momentum."""

    def __init__(self, megabytes: int = 10) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(megabytes * 2**20 // 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.weight[:8] * batch[0].mean()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Few(LightningDataModule):
    """A few batches."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(64, 1)), batch_size=1)


class Plain(Callback):
    """Saves as lightning does."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        with tempfile.TemporaryDirectory(dir=trainer.default_root_dir) as folder:
            timed("trainer.save_checkpoint", lambda: trainer.save_checkpoint(Path(folder) / "x.ckpt"))


def timed(name: str, what: Any) -> None:
    """Note how long ``what`` takes."""
    began = time.perf_counter()
    what()
    seconds.setdefault(name, []).append(time.perf_counter() - began)


def measure(megabytes: int, rounds: int, root: Path) -> None:
    """All ways for one size."""
    own = CheckpointCallback.save
    for name, extra in (
        ("trainer.save_checkpoint", ["--trainer.enable_checkpointing", "false", "--trainer.callbacks+=__main__.Plain"]),
        ("lockstep, background", ["--checkpoint.every_n_steps", "1"]),
        ("lockstep, foreground", ["--checkpoint.every_n_steps", "1", "--checkpoint.async_save", "false"]),
    ):

        def save(keeper: CheckpointCallback, trainer: Trainer, name: str = name) -> None:
            if keeper.writer is not None:
                keeper.writer.wait_until_finished(lambda number: number)  # not a part of this save: the one before
            timed(name, lambda: own(keeper, trainer))

        CheckpointCallback.save = save
        arguments = [
            *("--model", "__main__.Heavy", f"--model.megabytes={megabytes}", "--data", "__main__.Few"),
            *("--trainer.max_steps", str(rounds), "--wandb.mode", "disabled", "--run.root", str(root), *extra),
        ]
        train("fit", *parse_config(arguments), World())
    CheckpointCallback.save = own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    given = parser.parse_args()
    table = Table("state", "", "training stands still", "× trainer.save_checkpoint", box=None)
    for megabytes in given.megabytes:
        seconds.clear()
        with tempfile.TemporaryDirectory() as folder:
            measure(megabytes, given.rounds, Path(folder))
        plain = statistics.median(seconds["trainer.save_checkpoint"])
        for name, values in seconds.items():
            median = statistics.median(values)
            table.add_row(f"{megabytes} MB", name, f"{1000 * median:.0f} ms", f"{median / plain:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
