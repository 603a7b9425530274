"""ZeRO over gloo: the losses of DDP, the same weights after a kill, from any number of ranks and stage to any other."""

from pathlib import Path

import pytest
from conftest import REPO, Launch
from test_resume import assert_same, go_on, left_alone, trouble

RUN = (
    *("--config", str(REPO / "configs/digits.yaml"), "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"),
    *("--model.network", "lockstep.networks.MLP", "--model.network.hidden", "[64,96]", "--checkpoint.every_n_steps", "7"),
)


def zero(stage: int, ranks: int) -> list[str]:
    """Arguments for a stage and a number of ranks."""
    return ["--strategy", "deepspeed", "--deepspeed.stage", str(stage), "--ranks", str(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_are_those_of_ddp(launch: Launch, stage: int, ranks: int) -> None:
    ddp = left_alone(launch, *RUN)
    run = launch(*RUN, *zero(stage, ranks))
    assert run.status == 0
    assert run.series("train/loss")[:50] == pytest.approx(ddp.series("train/loss")[:50], abs=1e-5)
    assert run.result["metrics"]["test/correct"] == ddp.result["metrics"]["test/correct"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_killed_run_ends_with_the_same_weights(launch: Launch, tmp_path: Path, stage: int) -> None:
    told = (*RUN, *zero(stage, 2))
    undisturbed = left_alone(launch, *told)
    killed = launch(*told, *trouble(tmp_path / "once", "SIGKILL", step=33, rank=1))
    assert killed.status == 1
    assert_same(go_on(launch, killed), undisturbed)


def test_from_any_strategy_and_number_of_ranks_to_any_other(launch: Launch, tmp_path: Path) -> None:
    ddp = left_alone(launch, *RUN)
    run = launch(*RUN, *zero(3, 4), *trouble(tmp_path / "0", "SIGTERM", step=10))
    chain = [["--strategy", "ddp", "--ranks", "2"], zero(1, 2), zero(3, 1), zero(2, 4)]
    for number, told in enumerate(chain, start=1):
        go_on(launch, run, *told, *trouble(tmp_path / str(number), "SIGTERM", step=10 + 10 * number))
    assert go_on(launch, run, *zero(1, 4)).status == 0
    assert run.series("train/loss") == pytest.approx(ddp.series("train/loss"), abs=1e-5)
