"""Predictions: one file, equal for any number of ranks and any strategy, and errors where predicting is impossible.

Each test is a few runs of a second or two in forked processes; those with ZeRO, which import DeepSpeed, come last.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.faults import fault
from support.runs import REPO, Launch, Outcome, undisturbed_run
from support.toy_model import ToyData, ToyModel
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lockstep.data.digits import Digits
from lockstep.strategies import preload

RUN = ("--config", str(REPO / "configs/digits.yaml"), "--trainer.max_epochs", "1", "--model.network", "lockstep.models.MLP")


def predicted(run: Outcome) -> dict[str, Tensor]:
    """Read the predictions of a finished run."""
    assert (run.status, run.result["status"], run.result["metrics"]) == (0, "finished", {})
    path = run.folder / "predictions.safetensors"
    assert run.result["predictions"] == str(path)
    assert [left.name for left in run.folder.glob(".predictions*")] == []
    tensors = load_file(path)
    assert {len(tensor) for tensor in tensors.values()} == {run.result["samples"]}
    return tensors


def test_classes_are_the_same_on_1_2_and_4_ranks_and_as_good_as_the_test(launch: Launch) -> None:
    trained = undisturbed_run(launch, *RUN)
    labels = Digits().load("test").labels
    files = []
    for ranks in ("1", "2", "4"):
        run = launch("predict", *RUN, "--ranks", ranks, "--data.batch_size", "47", "--ckpt_path", str(trained.folder))
        files.append(predicted(run)["predictions"])
        assert (
            f"360 samples predicted: {run.folder}/predictions.safetensors" in (run.folder / "logs/1/node-0/0.log").read_text()
        )
    for probabilities in files:
        assert (probabilities.shape, probabilities.dtype) == ((360, 10), torch.float32)
        torch.testing.assert_close(probabilities, files[0], rtol=0, atol=1e-5)
        assert int((probabilities.argmax(1) == labels).sum()) == trained.result["metrics"]["test/correct"]


class Named(ToyModel):
    """A module that returns a dict of predictions."""

    def predict_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        x, number = batch
        return {"number": number, "layers": self.layers(x), "grid": torch.zeros(len(x), 2, 3, dtype=torch.bool)}


class Forward(ToyModel):
    """A module with a ``forward``, which Lightning's ``predict_step`` calls."""

    def forward(self, batch: list[Tensor]) -> Tensor:
        logits: Tensor = self.layers(batch[0])
        return logits


class Numbered(ToyData):
    """37 numbered samples, which four ranks cannot share equally."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind

    def predict_dataloader(self) -> Any:
        x = torch.randn(37, 4, generator=torch.Generator().manual_seed(3))
        samples = TensorDataset(x, torch.arange(37))
        if self.kind == "sampler":
            return DataLoader(samples, batch_sampler=OwnSampler(SequentialSampler(samples), 8, drop_last=False))
        loader = DataLoader(samples, batch_size=8, shuffle=self.kind == "shuffled", drop_last=self.kind == "plain")
        return [loader, loader] if self.kind == "two" else [loader]


class OwnSampler(BatchSampler):
    """A user's batch sampler."""


def predict(launch: Launch, model: str, *arguments: str, data: str = f"{__name__}.Numbered") -> Outcome:
    """Predict with a user's model after training ``ToyModel`` for an epoch."""
    trained = undisturbed_run(
        launch,
        "--model",
        "support.toy_model.ToyModel",
        "--data",
        "support.toy_model.ToyData",
        "--trainer.max_epochs",
        "1",
    )
    return launch("predict", "--model", model, "--data", data, *arguments, "--ckpt_path", str(trained.folder))


@pytest.mark.filterwarnings("ignore:Your `predict_dataloader`'s sampler has shuffling enabled")
def test_a_users_module_predicts_each_sample_once_in_the_order_of_the_data_set(launch: Launch) -> None:
    alone = predicted(predict(launch, f"{__name__}.Named"))
    assert {name: (tuple(t.shape), t.dtype) for name, t in alone.items()} == {
        "number": ((37,), torch.int64),
        "layers": ((37, 1), torch.float32),
        "grid": ((37, 2, 3), torch.bool),
    }
    forward = predicted(predict(launch, f"{__name__}.Forward"))["predictions"]
    four = predicted(predict(launch, f"{__name__}.Named", "--ranks", "4"))
    shuffled = predicted(predict(launch, f"{__name__}.Named", "--ranks", "2", "--data.kind", "shuffled"))
    sampler = predicted(predict(launch, f"{__name__}.Named", "--data.kind", "sampler"))
    for tensors in (alone, four, shuffled, sampler):
        assert tensors["number"].tolist() == list(range(37))
        torch.testing.assert_close(tensors["layers"], forward, rtol=0, atol=1e-5)


def test_an_interrupted_prediction_leaves_no_file(launch: Launch, tmp_path: Path) -> None:
    run = predict(launch, f"{__name__}.Named", *fault(tmp_path / "once", "SIGTERM", hook="on_predict_batch_end"))
    assert (run.status, run.result["status"]) == (143, "interrupted")
    assert list(run.folder.glob("*predictions*")) == []


class Bad(ToyModel):
    """A module whose predictions do not fit into a file."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x = batch[0]
        returned = {"mean": x.mean(), "texts": {"x": x, "names": ["a"]}, "nothing": None, "ragged": x[:, : 1 + batch_idx]}
        return returned[self.kind]


@pytest.mark.filterwarnings("ignore:predict returned None")
@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            "ToyModel",
            ["--data", "support.toy_model.ToyData"],
            "data: ToyData has no predict_dataloader; define it to choose what to predict.",
        ),
        ("ToyModel", [], "model: ToyModel has neither predict_step nor forward; define one of them."),
        ("Bad", ["--model.kind", "mean"], "predict_step returns predictions () for 8 samples; the first dimension must be"),
        ("Bad", ["--model.kind", "texts"], "predict_step returns names list; return a tensor, or a dict or tuple of tensors"),
        ("Bad", ["--model.kind", "nothing"], "predict_step returns NoneType; return a tensor"),
        (
            "Bad",
            ["--model.kind", "ragged"],
            "returns predictions as torch.float32 (batch, 1) for one batch and as torch.float32",
        ),
        ("Named", ["--data.kind", "two"], "data: predict_dataloader returns 2 loaders; return one"),
        (
            "Named",
            ["--data.kind", "sampler", "--ranks", "2"],
            "data: predict_dataloader chooses the samples of each of 2 ranks itself",
        ),
        ("Named", ["--trainer.limit_predict_batches", "0"], "predict_dataloader gave no batch, so there are no predictions"),
    ],
)
def test_impossible_predictions_raise_errors(
    launch: Launch, capfd: pytest.CaptureFixture[str], model: str, arguments: list[str], message: str
) -> None:
    run = predict(launch, f"{'support.toy_model' if model == 'ToyModel' else __name__}.{model}", *arguments)
    said = capfd.readouterr().err
    assert run.status in (1, 2) and message in said and "Traceback" not in said
    assert list(run.folder.glob("*predictions*")) == []


def test_predict_needs_a_checkpoint(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("predict").status == 2
    assert "ckpt_path: must be set to predict: a checkpoint, or a run folder; --ckpt_path" in capfd.readouterr().err


def test_a_zero_3_run_is_predicted_by_any_strategy(launch: Launch) -> None:
    preload("deepspeed")
    zero = ["--strategy", "deepspeed", "--deepspeed.stage", "3", "--ranks", "2"]
    trained = undisturbed_run(launch, *RUN, *zero)
    by_ddp, by_zero = (
        predicted(launch("predict", *RUN, *how, "--data.batch_size", "47", "--ckpt_path", str(trained.folder)))["predictions"]
        for how in (["--ranks", "4"], zero)
    )
    torch.testing.assert_close(by_zero, by_ddp, rtol=0, atol=1e-5)
    right = int((by_zero.argmax(1) == Digits().load("test").labels).sum())
    assert right == trained.result["metrics"]["test/correct"]
