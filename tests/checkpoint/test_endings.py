"""A run that says "finished" has published the weights that it reports, however its training has ended.

Runs of real ranks on this machine, cheapest first.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from support.faults import fault
from support.runs import REPO, Launch, assert_published, assert_same_run, metric_rows, resume_run, undisturbed_run
from support.toy_model import ToyModel

from lockstep.distributed import consensus

TOY = (
    *("--model", f"{__name__}.Plain", "--data", "support.toy_model.ToyData", "--data.workers", "0"),
    *("--trainer.max_epochs", "2", "--trainer.limit_val_batches", "0"),
)
"""Two epochs of 20 steps without validation."""

DIGITS = ("--config", str(REPO / "configs/digits.yaml"), "--trainer.max_epochs", "2")


class Stops(Callback):
    """Sets ``should_stop`` when a hook is called after some step."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.stop)

    def stop(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class Plain(ToyModel):
    """A model without a schedule."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class LeavesEpochs(Plain):
    """Ends each epoch after some steps."""

    def on_train_batch_start(self, batch: object, batch_idx: int) -> int | None:
        return -1 if batch_idx == 7 else None


class HalvesWeights(Callback):
    """Changes the weights when training has ended, as StochasticWeightAveraging does."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in pl_module.parameters():
            parameter.data.mul_(0.5)


def own(name: str, **options: object) -> list[str]:
    """Arguments that add a callback."""
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in options.items())]


MINE = f"{__name__}."
EARLY = {"monitor": "train/loss_epoch", "mode": "min", "stopping_threshold": 100, "check_on_train_epoch_end": "true"}


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (own(f"{MINE}Stops", hook="on_train_batch_end", step=7), 7),
        (own(f"{MINE}Stops", hook="on_train_epoch_end", step=1), 20),
        (own("EarlyStopping", **EARLY), 20),
        (["--trainer.max_time", "{milliseconds: 400}", "--model.seconds", "0.1"], None),
        (own("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1), 40),
        (own(f"{MINE}HalvesWeights"), 40),
        (["--model", f"{MINE}LeavesEpochs"], 14),
        (["--trainer.max_epochs", "0"], 0),
        (["--trainer.fast_dev_run", "true"], 1),
    ],
)
def test_what_is_reported_is_published(launch: Launch, arguments: list[str], steps: int | None) -> None:
    run = launch("--ranks", "2", *TOY, *arguments)
    assert run.status == 0 and run.result["global_step"] == (run.newest.step if steps is None else steps)
    assert_published(run)


@pytest.mark.parametrize("hook", ["on_test_batch_start", "on_train_end"])
def test_the_end_of_training_happens_once(launch: Launch, tmp_path: Path, hook: str) -> None:
    halved = (*DIGITS, *own(f"{MINE}HalvesWeights"))
    undisturbed = undisturbed_run(launch, *halved)
    killed = launch(*halved, *fault(tmp_path / "once", "SIGKILL", hook=hook))
    assert killed.status != 0
    assert_same_run(resume_run(launch, killed), undisturbed)


def test_a_run_continues_where_another_was_stopped(launch: Launch) -> None:
    stopped = launch(*TOY, *own(f"{MINE}Stops", hook="on_train_epoch_end", step=1), *own(f"{MINE}HalvesWeights"))
    continued = launch(*TOY, "--ckpt_path", str(stopped.folder))
    assert (stopped.result["global_step"], continued.result["global_step"]) == (20, 40)
    nothing_left = launch(*TOY, "--ckpt_path", str(continued.folder))
    assert nothing_left.result["weights_sha256"] == continued.result["weights_sha256"]
    for run in (stopped, continued, nothing_left):
        assert_published(run)


IN_FOREGROUND = ("--checkpoint.async_save", "false", "--run.hang_timeout_seconds", "5")


def test_a_stop_reaches_ranks_that_are_added(launch: Launch, tmp_path: Path) -> None:
    stops = (*TOY, *IN_FOREGROUND, "--checkpoint.every_n_steps", "7", *own(f"{MINE}Stops", hook="on_train_batch_end", step=7))
    run = launch("--ranks", "2", *stops, *fault(tmp_path / "once", "SIGKILL", hook="on_train_epoch_end"))
    assert resume_run(launch, run, "--ranks", "3").status == 0
    assert run.result["global_step"] == 7


@pytest.mark.parametrize(
    ("ranks", "hook"), [("1", "on_train_epoch_end"), ("1", "on_train_batch_end"), ("2", "on_train_epoch_end")]
)
def test_added_ranks_reduce_the_metrics_of_the_epoch(launch: Launch, tmp_path: Path, ranks: str, hook: str) -> None:
    """Of dropout, only what the first attempt has drawn is equal."""
    saved = ("--ranks", ranks, *TOY, *IN_FOREGROUND, "--checkpoint.every_n_steps", "13", "--trainer.max_epochs", "1")
    undisturbed = undisturbed_run(launch, *saved)
    run = launch(*saved, *fault(tmp_path / "once", "SIGKILL", hook=hook, step=14))
    assert resume_run(launch, run, "--ranks", "3").status == 0  # which draw other dropout than one
    for metric in ("train/mean", "train/loss_epoch", "train/most"):
        assert run.series(metric) == pytest.approx(
            undisturbed.series(metric), rel=1e-6 if hook == "on_train_epoch_end" else 0.5
        )


class Diary(Callback):
    """Writes down each call of ``on_save_checkpoint``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(f"{trainer.global_step} ")


def test_user_code_hears_of_saves_only(launch: Launch, tmp_path: Path) -> None:
    diary = (*TOY, *IN_FOREGROUND, "--checkpoint.every_n_steps", "10", *own(f"{MINE}Diary", path=tmp_path / "diary"))
    run = launch(*diary, *fault(tmp_path / "once", "SIGKILL", step=23))
    assert resume_run(launch, run).status == 0
    assert (tmp_path / "diary").read_text() == "10 20 30 40 "


def test_without_checkpoints_no_weights_are_reported(launch: Launch) -> None:
    run = launch(*TOY, "--trainer.enable_checkpointing", "false")
    assert run.status == 0 and "weights_sha256" not in run.result


@pytest.mark.parametrize("ranks", [(0, 1), (0, 0), (1, 1)])
def test_a_test_that_fails_leaves_the_training_finished(launch: Launch, tmp_path: Path, ranks: tuple[int, int]) -> None:
    """On all ranks, or on one, which leaves the others."""
    fails = fault(tmp_path / "once", "raise", hook="on_test_batch_start", rank=ranks[0])
    fails += fault(tmp_path / "twice", "raise", hook="on_test_batch_start", rank=ranks[1])
    run = launch("--ranks", "2", *DIGITS, *fails)
    assert run.status == 0
    assert_published(run)
    assert run.result["test_error"].endswith("ValueError: injected fault")
    assert "test/accuracy" not in run.result["metrics"] and run.result["metrics"]["val/accuracy"] > 0.5


class StopsAlone(Callback):
    """Sets ``should_stop`` on one rank, in one hook, from step 7 to 20."""

    def __init__(self, rank: int, hook: str) -> None:
        self.rank = rank
        setattr(self, hook, self.stop)

    def stop(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and 7 <= trainer.global_step <= 20:
            trainer.should_stop = True


@pytest.mark.parametrize(("rank", "hook"), [(0, "on_train_batch_end"), (1, "on_train_epoch_end")])
def test_a_stop_on_one_rank_ends_all_ranks_after_the_same_step(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, hook: str
) -> None:
    monkeypatch.setattr(consensus, "_MEETING_SECONDS", 1.0)
    stops = own(f"{__name__}.StopsAlone", rank=rank, hook=hook)
    saved = (*TOY, *IN_FOREGROUND, "--ranks", "2", "--trainer.max_epochs", "40", "--checkpoint.every_n_steps", "30", *stops)
    undisturbed = undisturbed_run(launch, *saved)
    assert undisturbed.result["global_step"] == 100  # an exchange after 50 steps, its result after 50 more
    assert [row["step"] for row in metric_rows(undisturbed) if row["train/loss_step"]] == [
        str(step) for step in range(10, 101, 10)
    ]
    faults: dict[str, dict[str, Any]] = {"before": {"step": 45}, "at": {"hook": "on_train_epoch_end", "step": 100}}
    for name, options in faults.items():
        killed = launch(*saved, *fault(tmp_path / name, "SIGKILL", **options))
        assert killed.status != 0
        assert_same_run(resume_run(launch, killed), undisturbed)
        again = resume_run(launch, killed).result  # of a finished run
        assert (again["global_step"], again["weights_sha256"]) == (100, undisturbed.result["weights_sha256"])


def test_a_stop_between_two_rows_repeats_no_values(launch: Launch) -> None:
    stops = own(f"{MINE}Stops", hook="on_train_batch_end", step=7)
    classifier = launch(*DIGITS, "--trainer.log_every_n_steps", "5", *stops)
    assert [row["step"] for row in metric_rows(classifier) if row["train/loss"]] == ["5"]
    toy = launch(*TOY, "--trainer.log_every_n_steps", "5", *stops)
    rows = {row["step"]: row["train/loss_step"] for row in metric_rows(toy) if row["train/loss_step"]}
    assert list(rows) == ["5", "7"] and rows["5"] != rows["7"]
