"""Modules that are written for pytorch_lightning pass static validation and train."""

from pathlib import Path

import pytest
from support.configs import said, written
from support.runs import Launch

MINE = """
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback as Base
from lightning_fabric.utilities import rank_zero_only
from torch.utils.data import DataLoader, TensorDataset

class Model(pl.LightningModule):
    def __init__(self, width: int = 2):
        super().__init__()
        self.layer = torch.nn.Linear(width, 1)
    def training_step(self, batch, _):
        return self.layer(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(16, 2)), batch_size=4, shuffle=True)

class Watch(Base):
    def on_train_end(self, trainer, module):
        print("trained", isinstance(trainer, pl.Trainer), isinstance(module, pl.LightningModule))
"""


def test_a_project_of_pytorch_lightning_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, MINE, "mirrored.py")
    monkeypatch.syspath_prepend(tmp_path)
    mine = ["--model=mirrored.Model", "--data=mirrored.Data", "--trainer.callbacks+=mirrored.Watch"]
    mine += ["--trainer.callbacks+=pytorch_lightning.callbacks.Timer", "--trainer.log_every_n_steps=1"]
    assert said([*mine, "--model.widht=3"]) == (
        "model.widht (value 3): unknown argument of mirrored.Model; did you mean 'model.width'?"
    )
    run = launch(*mine, "--trainer.max_epochs=1", "--ranks=2")
    assert run.status == 0
    assert "trained True True" in capfd.readouterr().out
    assert "pytorch_lightning.callbacks.Timer" in (run.folder / "config.yaml").read_text()
