"""Configs as LightningCLI takes them: both parsers accept them, then runs that train and resume from them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from support.configs import DIGITS, said, written
from support.faults import fault
from support.runs import Launch, resume_run
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lockstep.core.errors import UsageError
from lockstep.trainer.config_parser import parse_config


def loader(shuffle: bool) -> DataLoader[Any]:
    x = torch.linspace(-1, 1, 64).reshape(32, 2)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=shuffle)


class WithLoaders(LightningModule):
    """A model that has its own loaders, and no optimizer."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, width)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = (self.layer(batch[0]) - batch[1]).square().mean()
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", (self.layer(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return loader(shuffle=False)


class WithoutLoaders(LightningModule):
    """A model that needs data."""


class Seeded(LightningDataModule):
    """Data that take the seed of the run."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()


MODEL = f"{__name__}.WithLoaders"
RUN = f"""
fit:
  seed_everything: true
  trainer: {{max_epochs: 2, log_every_n_steps: 1, precision: 32, enable_model_summary: false}}
  model.class_path: {MODEL}
  optimizer:
    class_path: torch.optim.SGD
    init_args: {{lr: 0.1, momentum: 0.9}}
  lr_scheduler: {{class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {{gamma: 0.5}}}}
test:
  model.class_path: nowhere.Model
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--model={MODEL}"],
        [f"--model={MODEL}", "--data=null"],
        [f"--model={MODEL}", "--data=lightning.pytorch.LightningDataModule"],
        ["--model.class_path", MODEL, "--model.init_args.width=2"],
        [f"--model.class_path={MODEL}", f"--data.class_path={__name__}.Seeded"],
        ["--config", f"model.class_path: {MODEL}\nmodel.init_args.width: 2\ntrainer.max_epochs: 3"],
        [f"--model={MODEL}", "--config", "optimizer: Adam"],
        [f"--model={MODEL}", "--optimizer=torch.optim.SGD", "--optimizer.lr=0.1"],
        [f"--model={MODEL}", "--optimizer.class_path=SGD", "--optimizer.init_args.lr=0.1"],
        [f"--model={MODEL}", "--optimizer=Adam", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"],
        [f"--model={MODEL}", "--config", f"fit: {{model.width: 2, data: {{class_path: {__name__}.Seeded}}}}"],
        [f"--model={MODEL}", f"--data={__name__}.Seeded", "--seed_everything=true"],
        [*DIGITS, "--trainer.precision=16"],
        [*DIGITS, "--config", "trainer: {precision: 16}"],
    ],
)
def test_both_parsers_accept(arguments: list[str]) -> None:
    assert said(arguments) == ""
    parse_config(arguments)


@pytest.mark.parametrize(("given", "meant"), [("16", "16-mixed"), ("bf16", "bf16-mixed"), ("32", "32-true"), ("64", "64-true")])
def test_short_names_of_precisions_mean_what_lightning_means(given: str, meant: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"trainer: {{precision: {given}}}")
    for arguments in (["--trainer.precision", given], ["--config", file]):
        assert parse_config([*DIGITS, *arguments])[1].trainer.precision == meant


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"--model={__name__}.WithoutLoaders"], "data: must be set, usually in a --config file such as configs/digits.yaml; "),
        ([f"--model={MODEL}", "--lr_scheduler=StepLR"], "lr_scheduler: needs an optimizer at the top level too"),
        (
            [f"--model={MODEL}", "--seed_everything=false"],
            "seed_everything: False must be 0 or more, and less tha",
        ),
        ([f"--model={MODEL}", "--config", "fit: 5"], "config: fit: 5: fit: expected a mapping, got 5."),
        (
            [f"--model={MODEL}", "--config", "fit: {trainer: {max_epoch: 1}}"],
            "trainer.max_epoch (value 1): unknown key; did yo",
        ),
        ([f"--model={MODEL}", "--optimizer=torch.optim.SGDD"], "optimizer: torch.optim.SGDD does not exist; did you mean"),
        ([f"--model={MODEL}", "--optimizer=torch.optim.SGD", "--optimizer.lrr=1"], "optimizer.lrr: unknown argument of torch"),
    ],
)
def test_message_of_a_mistake(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_config(arguments)
    assert raised.value.message.startswith(message)
    assert said(arguments) in (raised.value.message, "")  # torch's optimizers have decorators, which only an import resolves


def test_sections_of_other_commands_are_ignored(tmp_path: Path) -> None:
    file = written(tmp_path, f"model.class_path: {MODEL}\nfit: {{trainer.max_epochs: 3}}\ntest: {{trainer.max_epochs: 4}}\n")
    for command, expected in (("fit", 3), ("test", 4), ("validate", None)):
        assert parse_config([f"--config={file}", f"--data={__name__}.Seeded"], command)[1].trainer.max_epochs == expected


def test_a_run_without_data_and_with_an_optimizer_at_the_top_level_resumes(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, RUN)
    broken = launch("--config", file, "--ranks=2", "--checkpoint.every_n_steps=3", *fault(tmp_path / "fault", "raise", step=5))
    seed = parse_config([f"--config={broken.folder / 'config.yaml'}"])[1].seed_everything
    assert broken.status == 1 and isinstance(seed, int) and seed > 1, capfd.readouterr().err
    assert "optimizer: is used instead of" not in capfd.readouterr().err
    resumed = resume_run(launch, broken)
    whole = launch("--config", file, f"--seed_everything={seed}", "--ranks=2")
    assert resumed.status == whole.status == 0, capfd.readouterr().err
    assert resumed.result["weights_sha256"] == whole.result["weights_sha256"]
    assert resumed.result["metrics"]["test/loss"] == whole.result["metrics"]["test/loss"]
    assert len(whole.series("train/loss")) == 16
    other = launch("--config", file, "--ranks=2")
    assert other.status == 0 and other.result["weights_sha256"] != whole.result["weights_sha256"]
