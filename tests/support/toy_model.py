"""What the tests train: a tiny module that can fail in every way, and data that write down who prepared and set them up."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

VERSION = "as submitted"


class ToyModel(LightningModule):
    """A line; at ``step``, the rank ``rank`` does what ``trouble`` says."""

    def __init__(self, trouble: str = "none", rank: int = 1, step: int = 3, seconds: float = 0.02, word: str = "") -> None:
        super().__init__()
        self.trouble, self.rank, self.step, self.seconds, self.word = trouble, rank, step, seconds, word
        self.layer = torch.nn.Linear(1, 1)

    def on_fit_start(self) -> None:
        node = getattr(self.trainer.strategy, "node_rank", 0)  # a single device has none
        place = f"{VERSION}: rank {self.global_rank} node {node} local {self.local_rank}"
        print(f"{place} on {os.environ['SLURMD_NODENAME']} says {self.word!r}", flush=True)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        time.sleep(self.seconds)
        if self.global_rank == self.rank and self.global_step == self.step:
            if self.trouble != "none":
                Path(f"trouble-{os.environ['SLURM_JOB_ID']}").touch()
            if self.trouble == "raise":
                raise ValueError("the model was told to fail")
            if self.trouble == "sleep":
                time.sleep(1000)
            if self.trouble == "leave":
                os._exit(9)
            if self.trouble == "exit":
                sys.exit("there are no data")
            if self.trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "eat":
                self.eaten = [bytearray(os.urandom(2**20)) * 50 for _ in range(1000) if not time.sleep(0.02)]
        x, y = batch
        loss = ((self.layer(x) - y) ** 2).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ToyData(LightningDataModule):
    """Points of a line."""

    def __init__(self, diary: str | None = None) -> None:
        super().__init__()
        self.diary = diary

    def _note(self, what: str) -> None:
        if self.diary is not None:
            Path(self.diary).mkdir(exist_ok=True)
            (Path(self.diary) / f"{what}-{os.environ['SLURM_PROCID']}-{time.time_ns()}").touch()

    def prepare_data(self) -> None:
        self._note("prepare")

    def setup(self, stage: str) -> None:
        self._note("setup")

    def train_dataloader(self) -> DataLoader:
        x = torch.linspace(-1, 1, 64)[:, None]
        return DataLoader(TensorDataset(x, 3 * x + 1), batch_size=8, shuffle=True)
