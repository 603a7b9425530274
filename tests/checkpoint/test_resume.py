"""A resumed run equals an undisturbed one: weights bit for bit, rows of metrics, one W&B history.

Runs of real ranks on this machine, cheapest first.
"""

import errno
import json
import os
import platform
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from support.faults import fault
from support.runs import REPO, Launch, Outcome, assert_same_run, metric_rows, resume_run, undisturbed_run
from support.toy_model import ToyModel
from support.wandb_reader import read_history

from lockstep.checkpoint.callback import CheckpointCallback
from lockstep.checkpoint.reader import find_checkpoint, latest_checkpoint, published_checkpoints
from lockstep.core.errors import UsageError
from lockstep.runs import Owner

DIGITS = (
    *("--config", str(REPO / "configs/digits.yaml"), "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "5"),
    *("--model.network", "lockstep.models.MLP", "--model.network.hidden", "[64,96]", "--checkpoint.every_n_steps", "7"),
)
"""Three epochs of 20 steps; saved after steps 7, 14, 20, …"""

OWN = (
    *(
        "--model",
        "support.toy_model.ToyModel",
        "--data",
        "support.toy_model.ToyData",
        "--trainer.max_epochs",
        "4",
        "--trainer.log_every_n_steps",
        "6",
    ),
    *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.patience=9"),
    *("--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9", "--checkpoint.every_n_steps", "6"),
)


@pytest.mark.parametrize("where", ["on_train_start", "on_validation_batch_start", "on_test_batch_start", "on_train_epoch_end"])
@pytest.mark.parametrize("what", ["SIGKILL", "SIGTERM"])
def test_one_rank_anywhere(launch: Launch, tmp_path: Path, what: str, where: str) -> None:
    undisturbed = undisturbed_run(launch, *DIGITS)
    killed = launch(*DIGITS, *fault(tmp_path / "once", what, hook=where, step=0 if where == "on_train_start" else 40))
    assert killed.status != 0
    assert_same_run(resume_run(launch, killed), undisturbed)


@pytest.mark.parametrize(
    ("ranks", "what", "static"),
    [
        ("1", "SIGTERM", "false"),
        ("2", "SIGTERM", "false"),
        ("2", "raise", "true"),
        ("4", "SIGKILL", "false"),
        ("4", "SIGKILL", "true"),
    ],
)
def test_in_the_middle_of_an_epoch(launch: Launch, tmp_path: Path, ranks: str, what: str, static: str) -> None:
    wide = (*DIGITS, "--model.network.hidden", "[300,700,300]")
    small_buckets = ("--ranks", ranks, *wide, "--ddp.bucket_cap_mb", "1", "--ddp.static_graph", static)
    undisturbed = undisturbed_run(launch, *small_buckets)
    killed = launch(*small_buckets, *fault(tmp_path / "once", what, step=27, rank=int(ranks) - 1))
    assert killed.status != 0
    resumed = resume_run(launch, killed)
    assert_same_run(resumed, undisturbed)
    result = resumed.result
    assert result["attempts"] == 2 and result["seconds"]["lost"] > 0
    seconds = dict(result["seconds"])
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    assert what in result["reasons"][0] or (what == "raise" and "Error" in result["reasons"][0])


@pytest.mark.parametrize(
    "options",
    [
        ("--trainer.limit_train_batches", "15", "--data.num_workers", "1"),
        ("--trainer.val_check_interval", "0.25", "--trainer.accumulate_grad_batches", "3"),
        ("--trainer.max_epochs", "-1", "--trainer.max_steps", "33", "--trainer.val_check_interval", "6"),
    ],
)
def test_limited_epochs_accumulation_and_runs_in_steps(launch: Launch, tmp_path: Path, options: tuple[str, ...]) -> None:
    arguments = (*DIGITS, *options, "--checkpoint.every_n_steps", "4")
    undisturbed = undisturbed_run(launch, *arguments)
    steps = undisturbed.result["global_step"]
    where = ["on_validation_batch_start", "on_train_batch_end", "on_validation_batch_start"]
    run = launch(*arguments, *fault(tmp_path / "0", "SIGKILL", hook=where[0], step=steps // 4))
    for number in (1, 2):
        more = fault(tmp_path / str(number), "SIGKILL", hook=where[number], step=(number + 1) * steps // 4)
        assert resume_run(launch, run, *more).status != 0
    assert_same_run(resume_run(launch, run), undisturbed)


def test_twice_in_one_epoch_and_in_its_last_step(launch: Launch, tmp_path: Path) -> None:
    undisturbed = undisturbed_run(launch, "--ranks", "2", *DIGITS)
    run = launch("--ranks", "2", *DIGITS, *fault(tmp_path / "1", "SIGKILL", step=29))
    for number, step in ((2, 36), (3, 40)):
        more = fault(tmp_path / str(number), "SIGKILL", step=step, rank=1)
        assert resume_run(launch, run, *more).status == 1
    assert_same_run(resume_run(launch, run), undisturbed)
    assert run.result["attempts"] == 4


def test_a_user_module_needs_no_extra_methods(launch: Launch, tmp_path: Path) -> None:
    own = ("--ranks", "2", *OWN, "--checkpoint.async_save", "false")
    undisturbed = undisturbed_run(launch, *own)
    killed = launch(*own, *fault(tmp_path / "once", "SIGKILL", step=33))
    assert killed.status == 1
    assert_same_run(resume_run(launch, killed), undisturbed)
    assert len(undisturbed.series("train/mean")) == len(undisturbed.series("train/most")) == 4


def test_the_losses_continue_on_another_number_of_ranks(launch: Launch, tmp_path: Path) -> None:
    undisturbed = undisturbed_run(launch, "--ranks", "4", *DIGITS, "--model.schedule", "constant")
    run = launch("--ranks", "4", *DIGITS, "--model.schedule", "constant", *fault(tmp_path / "1", "SIGKILL", step=16))
    more = fault(tmp_path / "2", "SIGKILL", step=37)
    assert resume_run(launch, run, "--ranks", "2", *more).status == 1
    finished = resume_run(launch, run, "--ranks", "4")
    assert finished.status == 0
    assert finished.series("train/loss") == pytest.approx(undisturbed.series("train/loss"), abs=1e-4)
    assert finished.result["metrics"]["test/samples"] == 360


class Evaluated(ToyModel):
    """Ends its training with ``eval()``, and would not train on in that mode."""

    def on_train_start(self) -> None:
        assert self.training

    def on_train_end(self) -> None:
        self.eval()
        with torch.no_grad():
            next(self.parameters()).mul_(1.01)  # so that it is saved once more


def test_a_run_that_ended_in_eval_mode_trains_on(launch: Launch) -> None:
    run = launch("--model", f"{__name__}.Evaluated", *OWN[2:])
    assert run.status == 0 and run.newest.folder.name.endswith("-end")
    assert resume_run(launch, run, "--trainer.max_epochs", "5").status == 0


def test_sparse_gradients_are_kept(launch: Launch, tmp_path: Path) -> None:
    sparse = (
        *("--model", "foreign.optimizers.Sparse", "--data", "foreign.base.Points", "--trainer.max_epochs", "2"),
        *("--trainer.log_every_n_steps", "1", "--checkpoint.every_n_steps", "4"),
    )
    undisturbed = undisturbed_run(launch, *sparse)
    killed = launch(*sparse, *fault(tmp_path / "once", "SIGKILL", step=15))
    assert killed.newest.step > 0
    assert_same_run(resume_run(launch, killed), undisturbed)


@pytest.mark.parametrize("damage", ["cut", "bit", "missing"])
def test_a_damaged_checkpoint_is_named_and_ignored(
    launch: Launch, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    undisturbed = undisturbed_run(launch, *DIGITS)
    killed = launch(*DIGITS, *fault(tmp_path / "once", "SIGKILL", step=38))
    damaged, before, *_ = published_checkpoints(killed.folder / "checkpoints")
    file = damaged / "model.ckpt"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content[:-1] if damage == "cut" else content)
    found = latest_checkpoint(killed.folder / "checkpoints")
    assert found is not None and found.folder == before
    with pytest.raises(UsageError, match=rf"^ckpt_path: {file} is damaged; give another checkpoint, or a copy of"):
        find_checkpoint(file, "ckpt_path")
    capfd.readouterr()
    assert_same_run(resume_run(launch, killed), undisturbed)
    assert f"checkpoint {damaged} is damaged and is ignored: model.ckpt" in capfd.readouterr().err
    assert (damaged.parent / f"damaged-{damaged.name}").is_dir()  # where it does not count as one to keep


@pytest.mark.parametrize("what", ["open", "listdir"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    undisturbed = undisturbed_run(launch, "--ranks", "2", *DIGITS)
    killed = launch("--ranks", "2", *DIGITS, *fault(tmp_path / "once", "SIGKILL", step=38))
    names = sorted(os.listdir(killed.folder / "checkpoints"))

    def stale(*_: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "model.ckpt")

    with monkeypatch.context() as patch:
        where = "published_checkpoints" if what == "listdir" else "verify_pieces"
        patch.setattr(f"lockstep.checkpoint.reader.{where}", stale)
        failed = resume_run(launch, killed)
    assert failed.status == 1 and failed.result["status"] != "finished"
    failure = json.loads((failed.folder / "logs/2/failure.json").read_text())
    assert "Stale file handle" in failure["report"] and not failure.get("is_permanent", False)
    assert sorted(os.listdir(killed.folder / "checkpoints")) == names
    assert_same_run(resume_run(launch, killed), undisturbed)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_run_stops_in_time_in_an_evaluation(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    undisturbed = undisturbed_run(launch, "--ranks", "2", *DIGITS)
    marker = tmp_path / "once"

    def is_out_of_time(callback: CheckpointCallback) -> bool:
        if callback.trainer is None or callback.trainer.state.stage is None or callback.trainer.state.stage.value != stage:
            return False
        is_later = callback.trainer.global_step >= 40
        if is_later:
            marker.touch()
        return is_later

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCallback, "_is_out_of_time", is_out_of_time)
        stopped = launch("--ranks", "2", *DIGITS)
        assert marker.exists() and stopped.status == 128 + signal.SIGUSR2
        resumed = resume_run(launch, stopped)  # it has made no step since: an evaluation must not be stopped for ever
    if stage == "validate":
        assert resumed.status == 128 + signal.SIGUSR2  # after 20 more steps
        resumed = resume_run(launch, resumed)
    assert_same_run(resumed, undisturbed)


@pytest.mark.parametrize("damage", ["", '{"20": 0.'])
def test_damaged_records_are_named_and_the_best_checkpoint_stays(
    launch: Launch, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    best = ("--checkpoint.monitor", "val/loss", "--checkpoint.keep_last", "1")  # the highest loss is that of step 20
    killed = launch(*DIGITS, *best, *fault(tmp_path / "once", "SIGKILL", step=45))
    for name in ("checkpoints/scores.json", "status.json", "owner.json"):
        (killed.folder / name).write_text(damage)
    assert_same_run(resume_run(launch, killed), undisturbed_run(launch, *DIGITS))
    assert "scores.json is damaged (" in capfd.readouterr().err
    assert (killed.folder / "checkpoints" / "step-00000020").exists()


def test_a_rank_that_is_stopped_is_named_and_ended(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    undisturbed = undisturbed_run(launch, "--ranks", "2", *DIGITS)
    stuck = launch(
        "--ranks", "2", *DIGITS, "--run.hang_timeout_seconds", "2", *fault(tmp_path / "once", "SIGSTOP", step=30, rank=1)
    )
    assert stuck.status == 1
    said = capfd.readouterr().err
    assert "rank 1 does not answer" in said and "rank 0 has made no progress for" in said
    assert "File " in said.split("its stacks:")[1]  # its stack
    assert_same_run(resume_run(launch, stuck), undisturbed)


def test_a_rank_whose_disk_hangs_is_named_and_the_run_resumes(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    undisturbed = undisturbed_run(launch, "--ranks", "2", *DIGITS)
    hangs = ("--checkpoint.timeout_seconds", "1", *fault(tmp_path / "once", "hang", step=28, rank=1))
    hung = launch("--ranks", "2", *DIGITS, *hangs)
    assert hung.status == 1
    assert "rank 1 has not written its files of the checkpoint of step 28 in " in capfd.readouterr().err
    (hung.folder / "checkpoints" / ".step-00000028.1").mkdir(exist_ok=True)  # what a killed save leaves
    assert_same_run(resume_run(launch, hung), undisturbed)
    assert not list((hung.folder / "checkpoints").glob(".step-*"))


def test_the_same_run_is_not_trained_twice_at_once(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = launch(*DIGITS, *fault(tmp_path / "once", "SIGKILL", step=30))
    Owner.this_process().write(run.folder / "logs" / "1" / "owner.json")
    assert resume_run(launch, run).status == 2
    assert f"is being trained by process {os.getpid()} on {platform.node()}; end that first" in capfd.readouterr().err
    assert sorted(path.name for path in (run.folder / "logs").iterdir()) == ["1"]


def test_training_continues_without_checkpoints_but_is_not_finished_without_one(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    undisturbed = undisturbed_run(launch, *DIGITS)
    run = launch(*DIGITS, *fault(tmp_path / "once", "vanish", step=30))
    assert (run.status, run.result["status"], run.result["global_step"]) == (1, "failed", 60)
    said = capfd.readouterr().err
    assert "the checkpoint of step 35 could not be written (No such file or directory); training continues" in said
    assert "could not be written" in json.loads((run.folder / "status.json").read_text())["warning"]
    assert "Training has ended, but its weights are not saved: the checkpoint of step 60 could not be written" in said
    (run.folder / "gone").rename(run.folder / "checkpoints")
    assert_same_run(resume_run(launch, run), undisturbed)


def assert_all_rows(run: Outcome) -> list[dict[str, Any]]:
    """Check that W&B has each row of ``metrics.csv`` once, in order; return its history, which has media beside them."""
    found, expected = read_history(run.folder), metric_rows(run)
    rows = [(row["lockstep/row"], row["trainer/global_step"]) for row in found if "lockstep/row" in row]
    assert rows == [(number, int(row["step"])) for number, row in enumerate(expected, 1)]
    return found


def test_wandb_gets_the_rows_that_a_full_disk_refused(launch: Launch, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(root)], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        full, empty = fault(tmp_path / "1", "fill", step=13), fault(tmp_path / "2", "empty", step=48)
        run = launch(*DIGITS, "--wandb.mode", "offline", "--trainer.log_every_n_steps", "1", *full, *empty)
        assert run.status == 0
        assert_all_rows(run)
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


@pytest.mark.parametrize("what", ["SIGKILL", "SIGTERM"])
def test_wandb_gets_every_row_once(launch: Launch, tmp_path: Path, what: str) -> None:
    offline = (*DIGITS, "--ranks", "2", "--wandb.mode", "offline")
    run = launch(*offline, *fault(tmp_path / "once", what, step=33))
    assert resume_run(launch, run).status == 0
    found = assert_all_rows(run)
    assert [row["_step"] for row in found] == list(range(len(found)))
    losses = [row["train/loss"] for row in found if "train/loss" in row]
    assert losses == pytest.approx(run.series("train/loss"))


def test_wandb_may_die_and_loses_no_row(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calls = "--trainer.callbacks+=support.wandb_calls.WandbCalls"
    run = launch(*DIGITS, "--wandb.mode", "offline", calls, *fault(tmp_path / "once", "wandb", step=33))
    assert run.status == 0
    assert "W&B's service has ended (ConnectionResetError" in capfd.readouterr().err
    assert len(list(run.folder.glob("wandb/offline-run-*"))) > 1
    history = read_history(run.folder)
    assert [row["_step"] for row in history] == list(range(len(history)))
    assert [row["trainer/global_step"] for row in history if "image._type" in row] == list(
        range(1, run.result["global_step"] + 1)
    )
    assert [row["lockstep/row"] for row in history if "lockstep/row" in row] == list(range(1, len(metric_rows(run)) + 1))


class Overwrites(Callback):
    """Sets weights when training starts, also when it resumes."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.nn.init.zeros_(pl_module.get_parameter("layers.3.bias"))


@pytest.mark.parametrize("name", ["on_train_start of Overwrites", ""])
def test_a_hook_that_changes_restored_weights_is_named(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    toy = ("--model", "support.toy_model.ToyModel", "--data", "support.toy_model.ToyData", "--checkpoint.every_n_steps", "6")
    overwrites = [f"--trainer.callbacks+={__name__}.Overwrites"] if name else []
    run = launch(*toy, "--trainer.max_epochs", "1", *overwrites, *fault(tmp_path / "once", "raise", step=10))
    said = capfd.readouterr().err
    assert resume_run(launch, run).status == 0
    resumed = capfd.readouterr().err
    assert "restored weights" not in said
    if name:
        assert f"{name} or on_fit_start of ToyModel changed 1 restored weights, first layers.3.bias: each restart" in resumed
    else:
        assert "restored weights" not in resumed
