"""What goes wrong in the tests of resuming: once, at a given moment of a given rank."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric


class FaultCallback(Callback):
    """Does ``what`` on a rank the first time that hook ``where`` is called from ``step`` on; the file ``once`` says it has.

    Without ``once`` it does it each time.
    """

    def __init__(self, what: str, once: str | None, where: str = "on_train_batch_end", step: int = 0, rank: int = 0) -> None:
        self.what, self.once, self.step, self.rank = what, Path(once) if once else None, step, rank
        setattr(self, where, self.act)

    def act(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_rank != self.rank or trainer.global_step < self.step or trainer.sanity_checking:
            return
        if self.once is not None:
            if self.once.exists():
                return
            self.once.touch()
        if self.what == "raise":
            raise ValueError("told to")
        if self.what == "wandb":
            subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "wandb-core"], check=True)
        elif self.what == "pause":  # until somebody says that it is over
            while self.once is not None and not self.once.with_suffix(".over").exists():
                time.sleep(0.01)
        elif self.what == "fill":
            with contextlib.suppress(OSError), (Path(str(trainer.default_root_dir)) / "filler").open("wb") as filler:
                while filler.write(bytes(4096)):
                    filler.flush()
        elif self.what == "empty":
            (Path(str(trainer.default_root_dir)) / "filler").unlink()
        elif self.what == "vanish":
            folder = Path(str(trainer.default_root_dir)) / "checkpoints"
            folder.rename(folder.with_name("gone"))
        else:
            os.kill(os.getpid(), getattr(signal, self.what))


class Own(LightningModule):
    """A module that knows nothing of lockstep: means over epochs, a metric of its own, a plateau schedule, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1))
        self.mean = MeanMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = ((self.layers(x) - y) ** 2).mean()
        self.mean(loss.detach())
        self.log("train/mean", self.mean, on_step=False, on_epoch=True)
        self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("train/most", loss, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", ((self.layers(x) - y) ** 2).mean(), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}


class TwoOptimizers(Own):
    """One for each layer."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.layers[0], self.layers[3])]


class Odd(Own):
    """A frozen layer, which the optimizer is given too, a tied one, no dropout, and a parameter that it is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].requires_grad_(False)
        self.layers[2] = nn.Identity()
        self.again = self.layers[3]
        self.forgotten = nn.Parameter(torch.ones(3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.forgotten.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*self.layers[0].parameters(), *self.layers[3].parameters()], lr=0.02, eps=1e-4)


class Wide(Own):
    """A large layer, and a large frozen one that the optimizer is given as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 900), nn.ReLU(), nn.Linear(900, 700), nn.Linear(700, 800), nn.Linear(800, 1))
        self.layers[2].requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, eps=1e-4)


class Points(LightningDataModule):
    """Noisy points of a plane, with a worker."""

    def __init__(self, workers: int = 1) -> None:
        super().__init__()
        self.workers = workers

    def _loader(self, seed: int, shuffle: bool) -> DataLoader[Any]:
        x = torch.randn(240, 4, generator=torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=12, shuffle=shuffle, num_workers=self.workers)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(1, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(2, shuffle=False)


class StepRecorder(Callback):
    """Notes every step that rank zero does, and takes its time; so that a test can hit a moment and count what was done twice.

    Args:
        diary: File with a line for each step.
        seconds: Time of a step.
    """

    def __init__(self, diary: str, seconds: float = 0.0) -> None:
        self.diary, self.seconds = Path(diary), seconds

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        time.sleep(self.seconds)
        if trainer.is_global_zero:
            with self.diary.open("a") as file:
                file.write(f"{trainer.global_step}\n")
