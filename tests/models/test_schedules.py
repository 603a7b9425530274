"""Optimizers and learning-rate schedules without training."""

import math

import pytest
import torch
from torch import nn

from lockstep.core.errors import UsageError
from lockstep.models.optimizers import make_optimizer, parameter_groups
from lockstep.models.schedules import LearningRateSchedule


def test_warm_up_rises_linearly_to_one() -> None:
    factor = LearningRateSchedule("constant", warmup_steps=4).factor()
    assert [factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert LearningRateSchedule("constant", 3).factor(warmup_start=0.25)(0) == pytest.approx(0.25 + 0.75 / 4)


def test_cosine_falls_from_one_to_the_end() -> None:
    factor = LearningRateSchedule("cosine", warmup_steps=10, final=0.1).factor(total_steps=110)
    assert factor(10) == 1
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)
    assert factor(500) == pytest.approx(0.1)


def test_step_falls_every_step_size() -> None:
    factor = LearningRateSchedule("step", step_size=3, gamma=0.5).factor()
    assert [factor(step) for step in range(7)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]


def test_step_agrees_with_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.3)
    factor = LearningRateSchedule("step", step_size=4, gamma=0.3).factor()
    for step in range(12):
        assert factor(step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("step_size", [None, 0, -1])
def test_step_without_a_step_size_raises_error_that_names_the_key(step_size: int | None) -> None:
    with pytest.raises(UsageError, match=f"model.step_size: {step_size} must be 1 or more"):
        LearningRateSchedule("step", step_size=step_size)


def test_cosine_without_an_end_raises_error() -> None:
    with pytest.raises(UsageError, match=r"cosine needs an end; set trainer.max_epochs"):
        LearningRateSchedule("cosine").factor(total_steps=math.inf)


def test_only_matrices_and_filters_have_weight_decay() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    module[0].bias.requires_grad_(False)
    decayed, plain = parameter_groups(module, 0.1)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("name", "kind", "arguments"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9)}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("torch.optim.NAdam", torch.optim.NAdam, {}),
    ],
)
def test_optimizers(name: str, kind: type, arguments: dict[str, object]) -> None:
    optimizer = make_optimizer(name, parameter_groups(nn.Linear(2, 2), 0.1), 0.5, True, arguments)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert all(optimizer.param_groups[0][key] == value for key, value in arguments.items())
    if name in ("adamw", "sgd"):
        assert optimizer.param_groups[0]["fused"] is True


@pytest.mark.parametrize("name", ["adam", "torch.optim.Nope", "torch.nn.Linear", "no.such.Thing"])
def test_an_unknown_optimizer_raises_error(name: str) -> None:
    with pytest.raises(UsageError, match=r"model.optimizer: '" + name):
        make_optimizer(name, parameter_groups(nn.Linear(2, 2), 0), 0.1, False, {})


def test_an_argument_that_the_optimizer_does_not_take_raises_error() -> None:
    with pytest.raises(UsageError, match=r"model.optimizer_args: .*momentun"):
        make_optimizer("sgd", parameter_groups(nn.Linear(2, 2), 0), 0.1, False, {"momentun": 0.9})
