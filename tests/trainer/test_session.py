"""Runs of the default config are equal on 1, 2 and 4 ranks, when repeated, and from their saved config.

Each test is a few runs of a second or two in forked processes.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.runs import SMALL, Launch
from torch import Tensor

from lockstep.models.classifier import Classifier

DIGITS = ("--trainer.max_epochs", "3", "--trainer.max_steps", "50", "--trainer.log_every_n_steps", "1")


def test_first_losses_and_counted_samples_agree_on_1_2_and_4_ranks(launch: Launch) -> None:
    alone, two, four = (launch("--ranks", ranks, *DIGITS) for ranks in ("1", "2", "4"))
    assert len(alone.series("train/loss")) == 50
    for run in (two, four):
        assert run.series("train/loss")[:50] == pytest.approx(alone.series("train/loss")[:50], abs=1e-5)
        for count in ("test/samples", "test/correct"):
            assert run.result["metrics"][count] == alone.result["metrics"][count]
    assert alone.result["metrics"]["test/samples"] == 360
    assert [run.result["world_size"] for run in (alone, two, four)] == [1, 2, 4]


def test_the_default_config_reaches_97_percent_on_four_ranks(launch: Launch) -> None:
    run = launch("--nodes", "2", "--ranks", "2")
    assert run.result["metrics"]["test/accuracy"] >= 0.97


def test_the_same_seed_gives_the_same_weights_and_workers_change_nothing(launch: Launch) -> None:
    augmented = (*SMALL, "--data.augment", "true")
    first = launch(*augmented)
    again = launch(*augmented)
    workers = launch(*augmented, "--data.num_workers", "2")
    other = launch(*augmented, "--seed_everything", "7")
    digest = first.result["weights_sha256"]
    assert len(digest) == 64
    assert (again.result["weights_sha256"], workers.result["weights_sha256"]) == (digest, digest)
    assert other.result["weights_sha256"] != digest


def test_two_ranks_give_the_same_weights_twice_and_on_one_node_or_two(launch: Launch) -> None:
    runs = [launch(*layout, *SMALL) for layout in (("--ranks", "2"), ("--ranks", "2"), ("--nodes", "2"))]
    assert len({run.result["weights_sha256"] for run in runs}) == 1


def test_training_from_the_saved_config_gives_the_same_run(launch: Launch) -> None:
    first = launch(*SMALL, "--model.lr", "0.004", "--data.batch_size", "32")
    again = launch("--config", str(first.folder / "config.yaml"))
    assert again.result["weights_sha256"] == first.result["weights_sha256"]
    saved = [yaml.safe_load((run.folder / "config.yaml").read_text()) for run in (first, again)]
    assert saved[0] == saved[1]
    assert saved[0]["trainer"]["precision"] == "32-true"
    assert saved[0]["model"]["init_args"]["lr"] == 0.004


def test_validate_and_test_a_checkpoint_with_the_config_of_its_run(launch: Launch) -> None:
    trained = launch(*SMALL, "--model.network.widths", "[8,16]")
    newest = str(trained.newest.model)
    for where in (newest, str(trained.newest.folder), str(trained.folder)):
        tested = launch("test", "--ckpt_path", where)
        assert tested.status == 0
        for name in ("test/accuracy", "test/correct", "test/samples"):
            assert tested.result["metrics"][name] == trained.result["metrics"][name]
    validated = launch("--ranks", "2", "validate", "--ckpt_path", newest)
    assert validated.result["metrics"]["val/accuracy"] == pytest.approx(trained.result["metrics"]["val/accuracy"])
    assert "test/accuracy" not in validated.result["metrics"]


def test_going_on_from_a_checkpoint(launch: Launch) -> None:
    half = launch(*SMALL, "--trainer.max_epochs", "1", "--model.schedule", "constant")
    whole = launch(*SMALL, "--model.schedule", "constant", "--ckpt_path", str(half.folder))
    straight = launch(*SMALL, "--model.schedule", "constant")
    assert whole.result["weights_sha256"] == straight.result["weights_sha256"]


def test_batch_size_per_rank_scales_the_learning_rate_and_says_so(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    own = ["--data.batch_size", "null", "--data.batch_size_per_rank", "16", "--model.schedule", "constant"]
    run = launch("--ranks", "2", *SMALL, *own, "--model.warmup_steps", "0", "--model.lr", "0.001")
    said = capfd.readouterr().err
    assert "16 samples on each of 2 ranks: global batch size 32" in said
    assert "lr 0.001 for one rank's batch: scaled to 0.002 for 2 ranks, 8 warm-up steps" in said
    assert run.result["global_step"] == 80
    rates = run.series("optim/lr")
    assert 0.001 < rates[0] < 0.002
    assert rates[-1] == pytest.approx(0.002)


@pytest.mark.parametrize("compression", ["none", "bf16", "fp16"])
def test_gradient_compression_is_a_choice(launch: Launch, compression: str) -> None:
    options = ["--ddp.static_graph", "true", "--ddp.gradient_compression", compression]
    run = launch("--ranks", "2", *SMALL, *options)
    assert run.status == 0
    assert run.result["metrics"]["train/loss"] < 2.3


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision_from_the_config(launch: Launch, precision: str) -> None:
    run = launch(*SMALL, "--trainer.precision", precision)
    assert run.status == 0
    assert run.result["metrics"]["test/samples"] == 360
    assert run.result["metrics"]["test/accuracy"] > 0.5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_accumulation_and_clipping(launch: Launch, precision: str) -> None:
    more = ["--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.5", "--trainer.precision", precision]
    run = launch("--ranks", "2", *SMALL, *more)
    assert (run.status, run.result["global_step"]) == (0, 20)
    assert len(run.series("rate/step_ms")) == 4


def test_fast_dev_run(launch: Launch) -> None:
    run = launch("--trainer.fast_dev_run", "true")
    assert (run.status, run.result["global_step"]) == (0, 1)
    assert not (run.folder / "metrics.csv").exists()
    assert run.result["status"] == "finished"


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_overfit_batches(launch: Launch, ranks: str) -> None:
    arguments = ["--trainer.overfit_batches", "2", "--trainer.max_epochs", "30", "--trainer.log_every_n_steps", "2"]
    quiet = ["--trainer.check_val_every_n_epoch", "30", "--checkpoint.monitor", "null", "--run.test_after_fit", "false"]
    run = launch("--ranks", ranks, *arguments, *quiet)
    assert (run.status, run.result["global_step"]) == (0, 60)
    assert run.result["metrics"]["train/accuracy"] > 0.95


def test_profiler(launch: Launch, tmp_path: Path) -> None:
    where = ["--trainer.profiler.dirpath", str(tmp_path), "--trainer.profiler.filename", "profile"]
    run = launch(*SMALL, "--trainer.profiler", "SimpleProfiler", *where)
    assert run.status == 0
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()


class Draws(Classifier):
    """Notes what each rank draws at its first step, as dropout would."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 0:
            name = f"drawn-{self.global_rank}.txt"
            (Path(self.trainer.default_root_dir) / name).write_text(str(torch.rand(()).item()))
        return super().training_step(batch, batch_idx)


def test_each_rank_draws_its_own_dropout_and_the_same_again(launch: Launch) -> None:
    runs = [launch("--ranks", "2", *SMALL, "--model", f"{__name__}.Draws") for _ in range(2)]
    drawn = [[(run.folder / f"drawn-{rank}.txt").read_text() for rank in range(2)] for run in runs]
    assert drawn[0][0] != drawn[0][1]
    assert drawn[0] == drawn[1]


@pytest.mark.usefixtures("drawn_report")
def test_what_a_run_leaves_behind(launch: Launch) -> None:
    run = launch("--nodes", "2", "--ranks", "2", *SMALL)
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        *(
            "config.yaml",
            "launch.yaml",
            "metrics.csv",
            "report.html",
            "report.png",
            "result.json",
            "status.json",
            "logs",
            "checkpoints",
            "owner.json",
        ),
    }
    assert run.folder.stat().st_mode & 0o777 == 0o700
    attempt = run.folder / "logs" / "1"
    files = sorted(str(path.relative_to(attempt)) for path in attempt.rglob("*") if path.is_file())
    assert files == ["node-0/0.log", "node-0/1.log", "node-1/2.log", "node-1/3.log", "owner.json", "start.json"]
    launched = yaml.safe_load((run.folder / "launch.yaml").read_text())
    assert (launched["nodes"], launched["ranks_per_node"]) == (2, 2)
    assert launched["command"].startswith("python launch/local.py --nodes 2 --ranks 2")
    status = json.loads((run.folder / "status.json").read_text())
    assert (status["status"], status["step"], status["steps"], status["world_size"]) == ("finished", 40, 40, 4)
    result = run.result
    assert (result["status"], result["global_step"], result["epochs"], result["attempts"]) == ("finished", 40, 2, 1)
    seconds = result["seconds"]
    assert all(seconds[part] > 0 for part in ("starting", "training", "validation", "test")) and seconds["lost"] == 0
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    assert result["checkpoint"] == str(run.folder / "checkpoints" / "step-00000040")
    scores = dict(zip((20, 40), run.series("val/accuracy"), strict=True))
    assert result["best_score"] == pytest.approx(scores[result["best_step"]]) == pytest.approx(max(scores.values()))
    assert (result["name"], result["monitor"]) == ("digits", "val/accuracy") and result["start"] <= result["end"]
    assert result["commit"] == launched["git"]["commit"] and result["host"] == launched["host"]
    assert run.series("rate/samples_per_second")[0] > 0
    assert all(0 <= share <= 1 for share in run.series("rate/data_wait"))
    assert len(run.series("optim/grad_norm")) == 8
    log = (attempt / "node-0" / "0.log").read_text()
    assert "val/accuracy" in log and "finished: 40 steps, 2 epochs, 4 ranks" in log


def one_line_module(path: Path) -> None:
    """A LightningModule and a DataModule that know nothing of lockstep."""
    path.write_text(
        """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

class Line(LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.lr = lr
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = ((self.layer(x) - y) ** 2).mean()
        self.log("my/loss", loss, sync_dist=True)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

class Points(LightningDataModule):
    def __init__(self, n: int = 64):
        super().__init__()
        self.n = n
        self.skipped = 3  # which only lockstep's ImageFolder has as a set
    def train_dataloader(self):
        x = torch.linspace(-1, 1, self.n)[:, None]
        return DataLoader(TensorDataset(x, 3 * x + 1), batch_size=8, shuffle=True)
"""
    )


def test_ones_own_module_and_data_outside_the_repository(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_line_module(tmp_path / "mine_elsewhere.py")
    (tmp_path / "mine.yaml").write_text(
        "run: {name: line}\n"
        "trainer: {max_epochs: 5, log_every_n_steps: 1}\n"
        "model: {class_path: mine_elsewhere.Line, init_args: {lr: 0.3}}\n"
        "data: {class_path: mine_elsewhere.Points}\n"
    )
    monkeypatch.chdir(tmp_path)
    alone, two = (launch("--ranks", ranks, "--config", "mine.yaml") for ranks in ("1", "2"))
    assert (alone.status, two.status) == (0, 0)
    assert two.series("my/loss") == pytest.approx(alone.series("my/loss"), abs=1e-5)
    assert len(alone.series("my/loss")) == 40
    state = alone.weights
    assert float(state["layer.weight"]) == pytest.approx(3, abs=0.05)
