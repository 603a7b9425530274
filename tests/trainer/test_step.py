"""A training step calls what Lightning's own loop calls, in the same order: single Trainers in this process."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lockstep.core import RunError, World
from lockstep.data.loading import DataSharding
from lockstep.monitoring import NanGuard
from lockstep.strategies.ddp import SingleDevice
from lockstep.trainer.loops import replace_loops

HOOKS = [
    *(f"on_{stage}_{moment}" for stage in ("train_epoch", "train_batch", "validation_batch") for moment in ("start", "end")),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
]
MODULE_HOOKS = [*HOOKS, "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "backward"]
MODULE_HOOKS += ["optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step"]


class Model(LightningModule):
    """A linear layer that logs its loss at each step."""

    def __init__(self, bad_batch: int = -1) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        self.bad_batch = bad_batch
        nn.init.constant_(self.layer.weight, 0.5)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch[0]).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss / 0 if batch_idx == self.bad_batch else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", self.layer(batch[0]).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class EndsEpoch(Model):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 5 else None


def make_trainer(ours: bool, callbacks: list[Callback], **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2, "val_check_interval": 2, "limit_val_batches": 1}
    trainer = Trainer(
        strategy=SingleDevice(torch.device("cpu"), DataSharding(World(), 0)) if ours else "auto",
        **defaults | options,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if ours:
        replace_loops(trainer)
    return trainer


def fit(trainer: Trainer, module: LightningModule, batches: int = 7) -> None:
    loader = DataLoader(TensorDataset(torch.linspace(-1, 1, 4 * batches).reshape(-1, 2)), batch_size=2)
    trainer.fit(module, loader, loader)


def record(owner: Any, name: str, calls: list[tuple[Any, ...]], module: LightningModule) -> None:
    """Override the hook ``name`` of ``owner`` so that it appends to ``calls`` and then does what it did."""
    own = getattr(type(owner), name)

    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        kinds = [type(value).__name__ for value in (*args, *kwargs.values())]
        calls.append((type(owner).__mro__[1].__name__, name, module._current_fx_name, kinds))
        return own(self, *args, **kwargs)

    setattr(type(owner), name, hook)


def hook_calls(ours: bool, base: type[Model], options: dict[str, Any]) -> tuple[list[Any], dict[str, Any], Any]:
    """All calls of hooks in a run, the metrics after it, and the weights."""
    calls: list[tuple[Any, ...]] = []
    module = type("Recorded", (base,), {})()
    callback = type("Recorder", (Callback,), {})()
    for owner, names in ((module, MODULE_HOOKS), (callback, HOOKS)):
        for name in names:
            record(owner, name, calls, module)
    trainer = make_trainer(ours, [callback], **options)
    fit(trainer, module)
    return calls, {name: float(value) for name, value in trainer.callback_metrics.items()}, module.layer.weight.tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (Model, {}),
        (Model, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01}),
        (Model, {"profiler": "simple", "max_epochs": 1}),
        (EndsEpoch, {"log_every_n_steps": 1}),
    ],
)
def test_all_hooks_are_called_as_by_a_plain_trainer(base: type[Model], options: dict[str, Any]) -> None:
    assert hook_calls(True, base, options) == hook_calls(False, base, options)


class Steps(Callback):
    """Counts its batches."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.count += 1


class Appends(Callback):
    """Appends ``other`` in ``setup``, and removes it after two batches."""

    def __init__(self, other: Callback) -> None:
        self.other = other

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.callbacks.append(self.other)  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.callbacks.remove(self.other)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_callbacks_may_come_and_go_during_a_run() -> None:
    other = Steps()
    fit(make_trainer(True, [Appends(other)], max_epochs=1), Model())
    assert other.count == 2


class ChangesHooks(Callback):
    """Sets a hook on itself after two batches, replaces one of ``other``'s after three, and takes its own back after five."""

    def __init__(self, other: Callback) -> None:
        self.other = other
        self.calls: list[tuple[str, int]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            vars(self)["on_train_batch_end"] = lambda trainer, *_: self.calls.append(("end", trainer.global_step))
        if trainer.global_step == 3:
            vars(self.other)["on_train_batch_start"] = lambda trainer, *_: self.calls.append(("start", trainer.global_step))
        if trainer.global_step == 5:
            del self.on_train_batch_end


@pytest.mark.filterwarnings("ignore")
def test_callbacks_may_set_and_replace_hooks_during_a_run() -> None:
    found: list[Any] = []
    for is_ours in (True, False):
        other = Steps()
        callback = ChangesHooks(other)
        fit(make_trainer(is_ours, [callback, other], max_epochs=1), Model())
        found.append((callback.calls, other.count))
    ours, plain = found
    assert ours == plain
    calls = [("end", 3), ("start", 3), ("end", 4), ("start", 4), ("end", 5), ("start", 5), ("start", 6)]
    assert plain == (calls, 3)


class LogsTwice(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 2:
            self.log("loss", torch.zeros(()), on_epoch=True, reduce_fx="max")
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore")
def test_a_value_that_is_logged_in_another_way_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="twice in `training_step` with different arguments"):
        fit(make_trainer(True, []), LogsTwice())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batches", [20, 140])
def test_a_loss_that_is_not_finite_is_named_by_its_first_step_however_late_it_is_checked(batches: int) -> None:
    trainer = make_trainer(True, [NanGuard()], max_epochs=1, limit_val_batches=0, log_every_n_steps=1000)
    with pytest.raises(RunError, match="at step 12 on rank 0"):
        fit(trainer, Model(bad_batch=11), batches)


class LogsItsBatch(Model):
    """Logs the number of its batch, as a value and as a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("own", float(batch_idx), on_step=True, on_epoch=True)
        self.mean(float(batch_idx))
        self.log("metric", self.mean, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Rows(Callback):
    """The values of each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        names = ("own_step", "metric_step")
        values = trainer.callback_metrics
        self.rows.append({name: float(values[name]) for name in names if name in values})


@pytest.mark.filterwarnings("ignore")
def test_a_stand_in_batch_is_in_no_row_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, module = Rows(), LogsItsBatch()
    monkeypatch.setattr(SingleDevice, "_is_stand_in", property(lambda self: self.module.trainer.global_step in (0, 3)))
    trainer = make_trainer(True, [rows], max_epochs=1, limit_val_batches=0, log_every_n_steps=1)
    fit(trainer, module, batches=5)
    assert [row.get("own_step") for row in rows.rows] == [None, 1, 2, 2, 4]
    assert [row.get("metric_step") for row in rows.rows] == [None, 1, 2, 2, 4]
    for name in ("own_epoch", "metric_epoch"):
        assert float(trainer.callback_metrics[name]) == pytest.approx(7 / 3)
