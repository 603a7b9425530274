"""Optimizers, schedules, accumulation and clipping."""

from typing import Any

import torch
from support.runs import Outcome
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR

from foreign.base import Regression, Row


class Adam(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3)


class Lbfgs(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


class TwoManually(Regression):
    """An optimizer for each layer, stepped by hand; the second one accumulates two batches."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            self.clip_gradients(second, 0.5, "norm")
            second.step()
            second.zero_grad()

    def on_train_epoch_end(self) -> None:
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(self.layers[index].parameters(), lr=0.02) for index in (0, 2)]
        return optimizers, [ExponentialLR(optimizer, 0.5) for optimizer in optimizers]


class ByStep(Adam):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = StepLR(optimizer, step_size=2, gamma=0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}


class ByEpoch(Adam):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [ExponentialLR(optimizer, 0.5)]


class Plateau(Adam):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        plateau = ReduceLROnPlateau(optimizer, patience=0, threshold=9.0, threshold_mode="abs", factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}


class OneCycle(Regression):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TwoSchedules(Adam):
    """Two schedules of one optimizer, one of them by hand."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [
            {"scheduler": ConstantLR(optimizer, 0.1, total_iters=3), "interval": "step"},
            {"scheduler": ExponentialLR(optimizer, 0.5), "interval": "epoch"},
        ]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


class Groups(Regression):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.layers[0].parameters(), "lr": 0.01}, {"params": self.layers[2].parameters()}]
        return torch.optim.AdamW(groups, lr=0.03, weight_decay=0.1, eps=1e-3)


class NoOptimizer(Regression):
    def configure_optimizers(self) -> Any:
        return None


class Unstepped(Regression):
    """Optimizers in automatic optimization by frequency: only one is allowed, so one is stepped in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.scale

    def on_after_backward(self) -> None:
        assert self.scale.grad is not None
        self.scale.data.sub_(0.01 * self.scale.grad)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layers.parameters(), lr=0.05)


class DoubleMomentum(torch.optim.Optimizer):
    """SGD with momentum whose state is float64 for parameters in float32."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter, dtype=torch.float64))
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(0.01 * momentum)
        return loss


class Precise(Regression):
    def configure_optimizers(self) -> Any:
        return DoubleMomentum(self.parameters())


class Sparse(Regression):
    """An embedding with sparse gradients, by manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.embedding = nn.Embedding(8, 1, sparse=True)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x) + self.embedding((x[:, 0] > 0).long()), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layers.parameters(), lr=0.05), torch.optim.SparseAdam(self.embedding.parameters(), lr=0.05)


def steps(number: int) -> Any:
    """A check that the run took ``number`` steps."""

    def check(run: Outcome) -> None:
        assert run.result["global_step"] == number

    return check


ROWS = (
    Row("`AdamW`", model=Adam),
    Row("`LBFGS`", model=Lbfgs),
    Row("two optimizers by manual optimization, one accumulating", model=TwoManually, kill_step=14),
    Row("an optimizer whose state has another dtype than the weights", model=Precise),
    Row("sparse gradients, on several ranks", model=Sparse, refused="embedding: DDP divides all other gradients twice"),
    Row("a schedule by step, every second step", model=ByStep),
    Row("a schedule by epoch", model=ByEpoch),
    Row("`ReduceLROnPlateau`", "--trainer.max_epochs 3", model=Plateau, kill_step=15),
    Row("`OneCycleLR` over `estimated_stepping_batches`", model=OneCycle),
    Row("two schedules of one optimizer, `lr_scheduler_step`", model=TwoSchedules),
    Row("groups with a learning rate each", model=Groups),
    Row("`configure_optimizers` returns None", model=NoOptimizer),
    Row("a parameter outside the optimizer, stepped in a hook", model=Unstepped),
    Row(
        "`accumulate_grad_batches`", "--trainer.accumulate_grad_batches 2 --trainer.max_epochs 4", kill_step=10, check=steps(12)
    ),
    Row(
        "… with fewer batches at the end of an epoch",
        "--trainer.accumulate_grad_batches 4 --trainer.max_epochs 4",
        kill_step=7,
        check=steps(8),
    ),
    Row("`gradient_clip_val`, by norm", "--trainer.gradient_clip_val 0.5"),
    Row("`gradient_clip_val`, by value", "--trainer.gradient_clip_val 0.1 --trainer.gradient_clip_algorithm value"),
)
