"""Bad input gives one sentence with the key, the value and the remedy, and the right exit status.

Errors of validation and parsing, then of data and model in one process, then of several ranks.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from support.runs import REPO, SMALL, Launch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lockstep.core.errors import UsageError
from lockstep.models.classifier import Classifier
from lockstep.trainer.config_parser import parse_config

USAGE, RUNNING = 2, 1


def images(root: Path, classes: dict[str, int], parts: tuple[str, ...] = ("train", "val", "test")) -> None:
    """Write JPEG files of 20 × 24 pixels: in each part, the given number for each class."""
    for part in parts:
        for number, (name, count) in enumerate(classes.items()):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (24, 20), (40 + 60 * number + index,) * 3).save(root / part / name / f"{index}.jpg")


def folder_run(root: Path, *more: str) -> list[str]:
    """Arguments of a tiny run on folders of images."""
    return [
        *("--model", "lockstep.models.Classifier", "--model.network", "lockstep.models.MLP"),
        *("--model.network.shape", "[3, 8, 8]", "--model.network.num_classes", "2", "--model.num_classes", "2"),
        *("--data", "lockstep.data.ImageFolder", "--data.root", str(root)),
        *("--data.size", "8", "--data.batch_size", "4", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"),
        *more,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_epoch", "3"], "trainer.max_epoch (value 3): unknown key; did you mean 'trainer.max_epochs'"),
        (
            ["--model.lrr", "3"],
            "model.lrr (value 3): unknown argument of lockstep.models.Classifier; did you mean 'model.lr'",
        ),
        (["--data.batch", "3"], "data.batch (value 3): unknown argument of lockstep.data.Digits; did you mean"),
        (["--ddp.static_grph", "true"], "ddp.static_grph (value true): unknown key; did you mean 'ddp.static_graph'"),
        (["--trainer.max_epochs", "three"], "trainer.max_epochs: 'three' is not valid: expected int or null."),
        (["--model.lr", "fast"], "model.lr: 'fast' is not valid: expected float."),
        (
            ["--model.schedule", "cosin"],
            "model.schedule: 'cosin' is not valid: expected one of 'constant', 'cosine', 'step'; did",
        ),
        (["--strategy", "dp"], "strategy: 'dp' is not valid: expected one of 'ddp', 'deepspeed'"),
        (["--trainer.devices", "2"], "trainer.devices (value 2): cannot be set in a config; use the launcher's flag --ranks"),
        (["--trainer.strategy", "ddp"], "trainer.strategy (value ddp): cannot be set in a config; set strategy (ddp or deep"),
        (["--model", "nowhere.Model"], "model: nowhere.Model does not exist (No module named 'nowhere')"),
        (
            ["--model", "lockstep.models.Classifer"],
            "model: lockstep.models.Classifer does not exist; did you mean 'lockstep.models.Classifier'",
        ),
        (["--model", "torch.nn.Linear"], "model: torch.nn.Linear is not a LightningModule."),
        (["--data", "torch.nn.Linear"], "data: torch.nn.Linear is not a LightningDataModule."),
        (["--config", "nowhere.yaml"], "config: nowhere.yaml does not exist"),
        (["--config", "configs"], "config: configs is a folder, not a file."),
        (["--data", "Mnist"], "data: unknown class 'Mnist'; did you mean 'lockstep.data.MNIST'?"),
        (["--modle.lr", "1"], "modle.lr (value 1): unknown key; did you mean 'model.lr'?"),
        (["--trainer.callbacks+=EarlyStopping"], "trainer.callbacks.monitor: must be set; lightning.pytorch.callbacks.Ear"),
        (["--trainer.callbacks+=EarlyStoping"], "trainer.callbacks: unknown class 'EarlyStoping'; did you mean 'Early"),
        (
            ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=much"],
            "trainer.callbacks.decay: 'much' is not valid: expected float.",
        ),
        (["--trainer.callbacks+=TQDMProgressBar", "--trainer.callbacks+=RichProgressBar"], "trainer: "),
        (["--trainer.accelerator", "gpuu"], "trainer.accelerator: 'gpuu'"),
        (["tset"], "'tset' is not a command; did you mean 'test'"),
        (["--seed_everything", "-1"], "seed_everything: -1 must be 0 or more"),
        (["--seed_everything", "4294967296"], "seed_everything: 4294967296 must be 0 or more, and less than 2**32"),
        (["test"], "ckpt_path: must be set to test"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: nowhere.ckpt does not exist; give a checkpoint or a run folder."),
        (
            ["--model.network", "resnet19"],
            "model.network: torchvision has no classification model 'resnet19'; did you mean 'resnet1",
        ),
        (["--model.schedule", "step", "--model.step_size", "-1"], "model.step_size: -1 must be 1 or more"),
        (["--model.optimizer", "torch.optim.Nothing"], "model.optimizer: 'torch.optim.Nothing' is neither of adamw, sgd nor"),
        (["--data.batch_size", "0"], "data.batch_size: 0 must be 1 or more."),
        (["--data.batch_size_per_rank", "8"], "data.batch_size: 64 and data.batch_size_per_rank: 8 are both set"),
        (["--data.batch_size", "5000"], "batch_size=5000 is more than its 1280 samples"),
        (["--run.name", "a/b"], "run.name: 'a/b' must be letters, digits"),
        (["--trainer.max_epochs", "-1"], "model.schedule: cosine needs an end; set trainer.max_epochs"),
        (["--ranks", "3"], "data.batch_size: the global batch size 64 is not divisible by 3 ranks; use 63 or 66."),
    ],
)
def test_usage_error(launch: Launch, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert launch(*arguments).status == USAGE
    said = capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert said.count(message) == 1


def test_error_in_a_config_file_names_the_key(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    data = "data: {class_path: lockstep.data.Digits}\n"
    mine.write_text(f"model: {{class_path: lockstep.models.Classifier, init_args: {{lrx: 3}}}}\n{data}")
    assert launch("--config", str(mine)).status == USAGE
    assert "model.lrx (value 3): unknown argument of lockstep.models.Classifier; did you mean" in capfd.readouterr().err
    mine.write_text("trainr: {max_epochs: 1}\n")
    assert launch("--config", str(mine)).status == USAGE
    assert "trainr" in (said := capfd.readouterr().err) and "did you mean 'trainer" in said
    mine.write_text("trainer: {max_epoch: 1}\n")
    assert launch("--config", str(mine)).status == USAGE
    assert "trainer.max_epoch (value 1): unknown key; did you mean 'trainer.max_epochs'" in capfd.readouterr().err
    mine.write_text("trainer: {strategy: ddp}\n")
    assert launch("--config", str(mine)).status == USAGE
    assert "trainer.strategy (value ddp): cannot be set in a config; set strategy (ddp or deepspeed)" in capfd.readouterr().err
    mine.write_text("trainer: [\n")
    assert launch("--config", str(mine)).status == USAGE
    assert f"config: {mine} is not valid YAML" in capfd.readouterr().err
    mine.write_text("")
    assert launch("--config", str(mine)).status == USAGE
    assert f"config: {mine}: expected a mapping, got null." in capfd.readouterr().err
    mine.write_text(f"{data}model: {{class_path: lockstep.models.Classifier, init_args: {{lr: [1, 2]}}}}\n")
    assert launch("--config", str(mine)).status == USAGE
    assert "model.lr: '[1, 2]' is not valid: expected float." in capfd.readouterr().err


DYNAMIC = """
from jsonargparse.typing import PositiveInt
from lockstep.models import Classifier

def unchanged(cls):
    return cls

@unchanged
class Model(Classifier):
    def __init__(self, width: PositiveInt, pair: tuple[int, int] = (1, 2), size: int | list[int] = 3, **kwargs):
        super().__init__(**kwargs)

def __getattr__(name):
    raise AttributeError(f"no class {name}")
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "dynamic.Model"], "model.width: must be set; dynamic.Model requires it."),
        (["--model", "dynamic.Modle"], "model (dynamic.Modle): no class Modle"),
        (
            ["--model", "dynamic.Model", "--model.width=1", "--model.widht=3"],
            "model.widht: unknown argument of dynamic.Model; did you mean 'model.width'",
        ),
        (["--model", "dynamic.Model", "--model.width=0"], "model.width (dynamic.Model): Not of type PositiveInt: 0 does not"),
        (
            ["--model", "dynamic.Model", "--model.width=1", "--model.pair=[1]"],
            "model.pair (dynamic.Model): expected tuple with 2 elements. Got value: [1]",
        ),
        (
            ["--model", "dynamic.Model", "--model.width=1", "--model.size=[x]"],
            "model.size (dynamic.Model): expected int; expected int. Got value: x; Given value: ['x']",
        ),
        (
            ["--model.network", "dynamic.Model", "--model.network.width=0"],
            "model.network.width (dynamic.Model): Not of type PositiveInt: 0 does not conform to restriction v>0",
        ),
    ],
)
def test_an_error_that_only_an_import_shows_names_the_key(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dynamic.py").write_text(DYNAMIC)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "dynamic", raising=False)
    with pytest.raises(UsageError) as raised:
        parse_config(["--config", str(REPO / "configs/digits.yaml"), *arguments])
    assert raised.value.message.startswith(message)


def test_run_folder_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str], launch: Launch) -> None:
    (tmp_path / "runs").write_text("a file, not a folder")
    assert launch(*SMALL).status == USAGE
    assert f"run.root: {tmp_path / 'runs'} cannot be written" in capfd.readouterr().err


def test_missing_data_folder(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(*folder_run(tmp_path / "nothing")).status == USAGE
    assert f"data.root: {tmp_path / 'nothing'} is not a folder here; give the one with train/" in capfd.readouterr().err


def test_empty_class_folder(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "data", {"cat": 4, "dog": 4})
    (tmp_path / "data" / "train" / "eel").mkdir()
    assert launch(*folder_run(tmp_path / "data")).status == USAGE
    assert f"data.root: class folder {tmp_path / 'data' / 'train' / 'eel'} holds no" in capfd.readouterr().err


def test_train_and_val_with_different_classes(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "data", {"cat": 4, "dog": 4}, parts=("train",))
    images(tmp_path / "data", {"cat": 4, "fox": 4}, parts=("val",))
    assert launch(*folder_run(tmp_path / "data")).status == USAGE
    assert "have different classes: dog, fox only in one of them" in capfd.readouterr().err


def test_more_classes_in_the_data_than_outputs(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "data", {"cat": 4, "dog": 4, "eel": 4})
    assert launch(*folder_run(tmp_path / "data")).status == USAGE
    assert "model.num_classes: 2 outputs are too few for the 3 classes of the data" in capfd.readouterr().err


def test_network_with_other_outputs_than_num_classes(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(*SMALL, "--model.num_classes", "12").status == USAGE
    assert "model.network: ConvNet returns (64, 10) for 64 images" in capfd.readouterr().err


def test_more_ranks_than_samples(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "data", {"cat": 2, "dog": 1})
    arguments = folder_run(tmp_path / "data")
    assert launch("--ranks", "4", *arguments).status == USAGE
    assert "ImageFolder: 4 ranks are more than its 3 samples" in capfd.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_truncated_jpeg_is_named(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: str) -> None:
    images(tmp_path / "data", {"cat": 4, "dog": 4})
    broken = tmp_path / "data" / "train" / "dog" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    assert launch(*folder_run(tmp_path / "data", "--data.num_workers", workers)).status == RUNNING
    said = capfd.readouterr().err
    assert f"lockstep: {broken} is not a complete JPEG or PNG" in said
    assert "Traceback" not in said


def test_skipped_jpeg_is_counted(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "data", {"cat": 4, "dog": 4})
    for part in ("train", "test"):
        broken = tmp_path / "data" / part / "dog" / "2.jpg"
        broken.write_bytes(broken.read_bytes()[:200])
    skipping = folder_run(tmp_path / "data", "--data.on_corrupt", "skip")
    run = launch("--ranks", "2", *skipping)
    assert run.status == 0
    assert run.result["skipped_files"] == 2
    assert run.result["metrics"]["test/samples"] == 7
    assert launch("predict", *skipping, "--ckpt_path", str(run.folder)).status == RUNNING
    assert f"{broken} cannot be decoded, and predict skips no sample; replace the file" in capfd.readouterr().err


class Foreign(LightningModule):
    """A module that cannot take an empty batch, with buffers and metrics; it is not made for lockstep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 2)
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3).requires_grad_(False)
        self.train_accuracy, self.val_accuracy = (MulticlassAccuracy(2, average="micro") for _ in range(2))
        self.largest: Tensor
        self.register_buffer("largest", torch.zeros(()))

    def loss(self, batch: Any, accuracy: MulticlassAccuracy) -> Tensor:
        x, y = batch
        unused = 0 * self.norm(self.conv(x)).mean()  # backward needs it; its statistics are those of rank zero
        self.largest.copy_(torch.maximum(self.largest, x.view(len(x), -1).mean(1).max()))
        out = self.linear(x.view(x.size(0), -1))
        accuracy(out, y)
        return nn.functional.cross_entropy(out, y).add(unused)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch, self.train_accuracy)
        self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch, self.val_accuracy), on_step=True, sync_dist=True)
        self.log("val/accuracy", self.val_accuracy, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.conv.parameters(), *self.linear.parameters()], lr=0.01, momentum=0.9)


@pytest.mark.parametrize("model", ["Classifier", "Foreign"])
def test_skipped_files_change_nothing_between_one_rank_and_two(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    """The samples that can be decoded weigh alike; a rank that has none in a batch goes on."""
    images(tmp_path / "data", {"cat": 4, "dog": 4})
    cats = tmp_path / "data" / "train" / "cat"
    (cats / "2.jpg").write_bytes((cats / "2.jpg").read_bytes()[:200])
    (cats / "1.jpg").unlink()
    (cats / "1.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "data" / "val" / "dog" / "0.jpg").write_bytes(b"")
    for batch_size in ("2", "4"):
        skipping = folder_run(tmp_path / "data", "--data.on_corrupt", "skip", "--data.augment", "false")
        if model == "Foreign":
            skipping = ["--model", f"{__name__}.Foreign", *skipping[skipping.index("--data") :]]
        runs = [launch("--ranks", ranks, *skipping, "--data.batch_size", batch_size) for ranks in ("1", "2")]
        assert [run.status for run in runs] == [0, 0]
        assert [run.result["skipped_files"] for run in runs] == [3, 3]
        train_loss = ("train/loss",) if model == "Classifier" else ("train/loss_step", "train/loss_epoch")
        val_loss = ("val/loss",) if model == "Classifier" else ("val/loss_step", "val/loss_epoch")
        for name in (*train_loss, "train/accuracy", *val_loss, "val/accuracy"):
            assert runs[1].series(name) == pytest.approx(runs[0].series(name), rel=1e-5), name
        assert model == "Classifier" or runs[1].weights["largest"] == 0
        for name in [name for name in runs[0].weights if "norm" not in name]:
            weight = runs[0].weights[name]
            torch.testing.assert_close(runs[1].weights[name], weight)
    assert f"skipped {cats / '1.jpg'}: it cannot be decoded" in capfd.readouterr().err


def test_a_batch_without_a_file_that_can_be_decoded_ends_the_run(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path / "data", {"cat": 2, "dog": 2})
    for file in (tmp_path / "data" / "train").glob("*/*.jpg"):
        file.write_bytes(b"no image")
    assert launch("--ranks", "2", *folder_run(tmp_path / "data", "--data.on_corrupt", "skip")).status == RUNNING
    said = capfd.readouterr().err
    assert "None of the files of a batch can be decoded; the first: " in said and "Traceback" not in said


def test_a_dangling_link_and_a_name_that_is_not_utf8_are_named(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path / "data", {"cat": 4, "dog": 4})
    dogs = tmp_path / "data" / "train" / "dog"
    strange = os.fsencode(dogs / "1") + b"\xff.jpg"
    os.rename(dogs / "1.jpg", strange)
    assert launch(*folder_run(tmp_path / "data")).status == 0
    os.unlink(strange)
    os.symlink(dogs / "gone.jpg", strange)
    capfd.readouterr()
    assert launch(*folder_run(tmp_path / "data")).status == RUNNING
    said = capfd.readouterr().err
    assert f"lockstep: {dogs}/1\\xff.jpg cannot be read (No such file or directory); restore it, or set" in said
    assert "Traceback" not in said


class NanOnOneRank(Classifier):
    """A model whose loss is NaN at one step on one rank."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 27 and self.global_rank == 1 else loss


def test_nan_loss_names_step_and_rank_and_keeps_the_last_good_checkpoint(
    launch: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", f"{__name__}.NanOnOneRank", "--model.network", "lockstep.models.ConvNet"]
    run = launch("--ranks", "2", *SMALL, *arguments, "--trainer.log_every_n_steps", "10")
    assert run.status == RUNNING
    said = capfd.readouterr().err
    assert "The loss is not a finite number at step 28 on rank 1." in said
    assert said.count("not a finite number") == 1
    assert "failed first" not in said
    assert run.newest.step == 20
    assert all(tensor.isfinite().all() for tensor in run.weights.values())
    assert run.result["status"] == "failed"
    assert "step 28 on rank 1" in run.result["reason"]


class Broken(nn.Module):
    """A network whose constructor raises."""

    def __init__(self) -> None:
        super().__init__()
        raise ArithmeticError("a user's mistake")


class NoData(LightningDataModule):
    """Data without loaders."""


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_an_exception_of_a_user_class_keeps_its_traceback(
    launch: Launch, capfd: pytest.CaptureFixture[str], ranks: str
) -> None:
    assert launch("--ranks", ranks, *SMALL, "--model.network", f"{__name__}.Broken").status == RUNNING
    said = capfd.readouterr().err
    assert said.count("ArithmeticError: a user's mistake") == 1
    assert 'raise ArithmeticError("a user' in said
    assert said.count("Traceback") == 1
    assert "logs: " in said[said.index("ArithmeticError") :] and "to resume: " in said.splitlines()[-1]
