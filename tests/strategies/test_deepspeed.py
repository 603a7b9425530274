"""ZeRO over gloo in forked ranks: the losses of DDP, resuming bit for bit, and changes of ranks, stage and strategy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from support.deepspeed_runs import RUN, zero
from support.faults import fault
from support.forks import run_forked
from support.runs import REPO, Launch, assert_same_run, resume_run, undisturbed_run

from lockstep import cli
from lockstep.data.digits import Digits
from lockstep.models.networks import MLP
from lockstep.strategies import preload


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import DeepSpeed once, before ranks are forked."""
    preload("deepspeed")


class Unfreezes(Callback):
    """Freezes a layer before training, and unfreezes it at step 13."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        next(pl_module.parameters()).requires_grad_(False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 13:
            next(pl_module.parameters()).requires_grad_(True)


@pytest.mark.parametrize("stage", [1, 3])
def test_parameters_that_are_unfrozen_later_are_refused(launch: Launch, capfd: pytest.CaptureFixture[str], stage: int) -> None:
    run = launch(*RUN, *zero(stage, 2), f"--trainer.callbacks+={__name__}.Unfreezes")
    said = capfd.readouterr().err
    assert run.status == 2 and "begins to require one later; let it do so from the start, or use strategy ddp." in said
    assert run.newest.step == 10


DDP = ["--strategy", "ddp", "--ranks", "2"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_are_those_of_ddp(launch: Launch, stage: int, ranks: int) -> None:
    ddp = undisturbed_run(launch, *RUN)
    run = launch(*RUN, *zero(stage, ranks))
    assert run.status == 0
    assert run.series("train/loss") == pytest.approx(ddp.series("train/loss"), abs=1e-5)
    assert run.result["metrics"]["test/correct"] == ddp.result["metrics"]["test/correct"]
    assert run.series("optim/grad_norm") == pytest.approx(ddp.series("optim/grad_norm"), rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_killed_run_ends_with_the_same_weights(launch: Launch, tmp_path: Path, stage: int) -> None:
    told = (*RUN, *zero(stage, 2))
    undisturbed = undisturbed_run(launch, *told)
    killed = launch(*told, *fault(tmp_path / "once", "SIGKILL", step=17, rank=1))
    assert killed.status == 1
    assert_same_run(resume_run(launch, killed), undisturbed)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulated_gradients_equal_those_of_ddp_also_at_the_end_of_an_epoch(
    launch: Launch, tmp_path: Path, stage: int
) -> None:
    accumulated = (*RUN, "--trainer.accumulate_grad_batches", "3")
    ddp, undisturbed = undisturbed_run(launch, *accumulated), launch(*accumulated, *zero(stage, 2))
    assert undisturbed.series("train/loss") == pytest.approx(ddp.series("train/loss"), abs=1e-5)
    assert undisturbed.result["global_step"] == ddp.result["global_step"] == 12
    killed = launch(*accumulated, *zero(stage, 2), *fault(tmp_path / "once", "SIGKILL", step=9, rank=1))
    assert_same_run(resume_run(launch, killed), undisturbed)


def test_a_user_module(launch: Launch, tmp_path: Path) -> None:
    own = (
        *(
            "--model",
            "support.toy_model.ToyModel",
            "--data",
            "support.toy_model.ToyData",
            "--data.samples",
            "120",
            "--trainer.max_epochs",
            "4",
            "--trainer.log_every_n_steps",
            "3",
        ),
        *("--checkpoint.every_n_steps", "6", "--checkpoint.monitor", "val/loss", "--checkpoint.mode", "min", *zero(3, 2)),
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.patience=9"),
    )
    undisturbed = launch(*own)
    killed = launch(*own, *fault(tmp_path / "once", "SIGKILL", step=23))
    assert_same_run(resume_run(launch, killed), undisturbed)


@pytest.mark.timeout(150)  # seven runs
def test_frozen_tied_and_unused_parameters(launch: Launch, tmp_path: Path) -> None:
    odd = (
        "--model",
        "support.toy_model.TiedAndFrozen",
        "--data",
        "support.toy_model.ToyData",
        "--data.samples",
        "120",
        "--trainer.max_epochs",
        "3",
        "--checkpoint.every_n_steps",
        "6",
    )
    ddp = launch(*odd, "--ranks", "2")
    run = launch(*odd, *zero(3, 2), *fault(tmp_path / "0", "SIGTERM", step=5))
    for number, told in enumerate((zero(1, 2), zero(3, 2), ["--strategy", "ddp"], zero(3, 1)), start=1):
        resume_run(launch, run, *told, *fault(tmp_path / str(number), "SIGTERM", step=5 + 4 * number))
    finished = resume_run(launch, run, *zero(2, 2))
    assert finished.status == 0
    assert finished.series("val/loss") == pytest.approx(ddp.series("val/loss"), abs=1e-5)
    out = tmp_path / "weights.safetensors"
    assert run_forked(cli.main, "export", str(run.folder), "--out", str(out)).returncode == 0
    weights, expected = load_file(out), ddp.weights
    assert weights.keys() == expected.keys() and "tied.weight" in weights
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


@pytest.mark.timeout(150)  # six runs
def test_from_any_strategy_and_number_of_ranks_to_any_other(launch: Launch, tmp_path: Path) -> None:
    ddp = undisturbed_run(launch, *RUN)
    run = launch(*RUN, *zero(3, 4), *fault(tmp_path / "0", "SIGTERM", step=5))
    chain = [["--strategy", "ddp", "--ranks", "2"], zero(1, 2), zero(3, 1), zero(2, 4)]
    for number, told in enumerate(chain, start=1):
        resume_run(launch, run, *told, *fault(tmp_path / str(number), "SIGTERM", step=5 + 5 * number))
    assert resume_run(launch, run, *zero(1, 4)).status == 0
    assert run.series("train/loss") == pytest.approx(ddp.series("train/loss"), abs=1e-5)


def test_channels_last_weights(launch: Launch, tmp_path: Path) -> None:
    digits = ("--config", str(REPO / "configs/digits.yaml"), "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1")
    told = (*digits, "--data.batch_size", "128", "--model.network.widths", "[8,16]", "--model.channels_last", "true")
    ddp = launch(*told, "--ranks", "2")
    run = launch(*told, *zero(3, 2), *fault(tmp_path / "0", "SIGTERM", step=5))
    for number, last in ((1, "true"), (2, "false")):
        resume_run(
            launch, run, *DDP, "--model.channels_last", last, *fault(tmp_path / str(number), "SIGTERM", step=6 + 4 * number)
        )
    assert resume_run(launch, run, *zero(1, 2), "--model.channels_last", "true").status == 0
    assert run.series("train/loss") == pytest.approx(ddp.series("train/loss"), abs=1e-5)
    tested = launch("test", *told, *zero(3, 2), "--ckpt_path", str(run.folder))
    assert tested.result["metrics"]["test/correct"] == run.result["metrics"]["test/correct"]


def test_the_exported_file_is_as_good_as_the_run(launch: Launch, tmp_path: Path) -> None:
    run = undisturbed_run(launch, *RUN, *zero(3, 2))
    out = tmp_path / "weights.safetensors"
    exported = run_forked(cli.main, "export", str(run.folder), "--part", "network", "--out", str(out))
    assert exported.returncode == 0 and exported.stdout.startswith(f"{out}: ")
    network = MLP(hidden=[64, 96])
    network.load_state_dict(load_file(out))
    data = Digits()
    images, labels = data.on_after_batch_transfer(data.load("test").__getitems__(list(range(360))), 0)
    right = int((network(images).argmax(1) == labels).sum())
    assert right == run.result["metrics"]["test/correct"]


@pytest.mark.parametrize(
    ("trained", "told"), [(zero(3, 2), DDP), (zero(3, 2), zero(3, 2)), (DDP, zero(1, 2)), (DDP, zero(3, 2))]
)
def test_a_run_is_evaluated_by_any_strategy(launch: Launch, trained: list[str], told: list[str]) -> None:
    run = undisturbed_run(launch, *RUN, *trained)
    tested = launch("test", *RUN, *told, "--ckpt_path", str(run.folder))
    assert tested.status == 0
    assert tested.result["metrics"]["test/correct"] == run.result["metrics"]["test/correct"]


@pytest.mark.parametrize("told", [DDP, zero(3, 2)])
def test_activation_checkpointing_changes_no_loss(launch: Launch, capfd: pytest.CaptureFixture[str], told: list[str]) -> None:
    run = launch(*RUN, *told, "--activation_checkpointing", "[torch.nn.Linear]")
    assert run.series("train/loss") == undisturbed_run(launch, *RUN, *told).series("train/loss")
    wrong = launch(*RUN, *told, "--activation_checkpointing", "[torch.nn.Conv2d]")
    assert wrong.status == 2
    assert "activation_checkpointing: the module has no submodule of class torch.nn.Conv2d" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--deepspeed.stage", "4"], "deepspeed.stage: '4' is not valid: expected one of 1, 2, 3."),
        (["--deepspeed.offload_param", "cpu"], "deepspeed.offload_param: 'cpu' needs deepspeed.stage 3; it is 2."),
        (
            ["--deepspeed.offload_optimizer", "disk"],
            "deepspeed.offload_optimizer: 'disk' is not valid: expected one of 'none',",
        ),
        (["--deepspeed.reduce_bucket_size", "0"], "deepspeed.reduce_bucket_size: 0 must be 1 or more."),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches: 0 must be 1 or more."),
        (["--deepspeed.config", "nowhere.json"], "deepspeed.config: nowhere.json cannot be read as JSON (No such file"),
        (
            ["--trainer.callbacks+=EMAWeightAveraging"],
            "trainer.callbacks: EMAWeightAveraging copies the weights",
        ),
        (
            ["--trainer.callbacks+=ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured"],
            "trainer.callbacks: ModelPruning copies the weights, which ZeRO partitions; use strategy ddp.",
        ),
        (
            ["--trainer.gradient_clip_val=1", "--trainer.gradient_clip_algorithm=value"],
            "trainer.gradient_clip_algorithm: 'value' is not supported: ZeRO clips by norm; use strategy ddp.",
        ),
        (
            ["--distributed.backend=gloo", "--trainer.accelerator=gpu"],
            "distributed.backend: 'gloo' on GPUs is not supported: ZeRO needs nccl there; use strategy ddp.",
        ),
        (
            ["--model", "support.toy_model.TwoOptimizers", "--data", "support.toy_model.ToyData"],
            "model: TwoOptimizers has several optimizers or schedules, and ZeRO supports one; use strategy ddp.",
        ),
    ],
)
def test_contradictory_options_are_refused(
    launch: Launch, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert launch("--strategy", "deepspeed", *arguments).status == 2
    said = capfd.readouterr().err
    assert f"lockstep: {message}" in said and "Traceback" not in said


class ChangesWeights(Callback):
    """Unfreezes a parameter in training, or changes one when training has ended."""

    def __init__(self, unfreezes: bool) -> None:
        self.unfreezes = unfreezes

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        next(pl_module.parameters()).requires_grad_(not self.unfreezes)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 3:
            next(pl_module.parameters()).requires_grad_(True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        next(pl_module.parameters()).data.mul_(0.5)


@pytest.mark.parametrize(
    ("unfreezes", "status", "message"),
    [
        ("true", 2, "strategy: deepspeed shards the parameters that require a gradient before training, and layers.0.weight"),
        ("false", 1, "A hook has changed the weights after the last step (on_train_end of the module or of a callback), but"),
    ],
)
def test_weights_that_the_optimizer_does_not_have_are_refused(
    launch: Launch, capfd: pytest.CaptureFixture[str], unfreezes: str, status: int, message: str
) -> None:
    toy = ("--model", "support.toy_model.ToyModel", "--data", "support.toy_model.ToyData", "--data.workers", "0")
    changes = (f"--trainer.callbacks+={__name__}.ChangesWeights", f"--trainer.callbacks.unfreezes={unfreezes}")
    assert launch(*toy, *zero(2, 1), "--trainer.max_epochs", "1", *changes).status == status
    assert message in capfd.readouterr().err


def test_keys_of_the_json_that_other_keys_decide_are_refused(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.json"
    for text, ours in (
        ('{"train_batch_size": 4}', "train_batch_size (4) in {} is set by data.batch_size"),
        ('{"zero_optimization": {"stage": 1}}', "zero_optimization.stage (1) in {} is set by deepspeed.stage"),
        ('{"zero_optimisation": {}}', "zero_optimisation in {} is not a DeepSpeed key; did you mean 'zero_optimization'"),
        ('{"zero_optimization": {"stag": 2}}', "DeepSpeed rejects stag (2) in DeepSpeedZeroConfig: "),
        ('{"bf16": true}', "bf16 (True) in {} must be a mapping."),
        (
            '{"zero_optimization": {"cpu_offload": true}}',
            "zero_optimization.cpu_offload (True) in {} is set by deepspeed.off",
        ),
        (
            '{"fp16": {"loss_scale": "auto"}}',
            "fp16.loss_scale ('auto') in {} is not filled in by lockstep; set a value or remove it.",
        ),
        (
            '{"zero_optimization": {"offload_optimizer": {"pipeline_write": true}}}',
            "zero_optimization.offload_optimizer.pipeline_write (True) in {} leaves a write open while a checkpoint is saved;",
        ),
        ('{"bf16": {"enabled": true}}', "bf16.enabled (True) in {} is set by trainer.precision"),
    ):
        own.write_text(text)
        assert launch("--strategy", "deepspeed", "--deepspeed.config", str(own)).status == 2
        assert ours.format(own) in capfd.readouterr().err
    own.write_text('{"zero_optimization": {"round_robin_gradients": true}}')
    assert launch(*RUN, *zero(1, 2), "--trainer.max_epochs", "1", "--deepspeed.config", str(own)).status == 0


def test_a_checkpoint_of_another_model_names_what_differs(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    run = undisturbed_run(launch, *RUN, *zero(1, 2))
    for told in (["--strategy", "ddp"], zero(2, 2)):
        other = launch(*RUN, *told, "--model.network.hidden", "[64,32]", "--ckpt_path", str(run.folder))
        assert other.status == 2
        assert (
            "of another model: network.4.weight is [32, 64] in the model and [96, 64] in the checkpoint"
            in capfd.readouterr().err
        )


@pytest.mark.parametrize(
    "more",
    [
        ["--deepspeed.offload_optimizer", "cpu", "--deepspeed.offload_param", "cpu"],
        ["--trainer.precision", "bf16-mixed"],
        ["--trainer.precision", "16-mixed", "--deepspeed.config", "scale.json"],
    ],
)
def test_offload_and_half_precision_resume_bit_for_bit(
    launch: Launch, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The loss scale grows until gradients overflow, repeatedly.
    Path("scale.json").write_text('{"fp16": {"initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}}')
    told = (*RUN, *zero(3, 2), *more, "--trainer.gradient_clip_val", "1")
    undisturbed = undisturbed_run(launch, *told)
    assert undisturbed.result["metrics"]["test/accuracy"] > 0.8
    killed = launch(*told, *fault(tmp_path / "once", "SIGKILL", step=17, rank=1))
    assert_same_run(resume_run(launch, killed), undisturbed)
