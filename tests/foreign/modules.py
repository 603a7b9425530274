"""What modules contain."""

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from support.runs import Outcome
from torch import Tensor, nn
from torch.utils.data import DataLoader

from foreign.base import Points, Regression, Row


class Normalized(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


class Dropped(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


class Frozen(Regression):
    """A frozen layer outside the optimizer, in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.layers[:2].requires_grad_(False).eval()

    def on_train_epoch_start(self) -> None:
        self.layers[:2].eval()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layers[3].parameters(), lr=0.05)


class Unused(Regression):
    """A layer that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


class Buffers(Regression):
    """A buffer that the forward pass updates alike on all ranks, one that is not saved, and an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("constant", torch.ones(4), persistent=False)
        self.count: Tensor
        self.constant: Tensor

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        if self.training:
            self.count += 1
        return super().loss((x * self.constant, y / (1 + 0.05 * self.count)))


class Tied(Regression):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
        self.layers[2].weight = self.layers[0].weight


class Spectral(Regression):
    """Spectral normalization, whose vectors a forward pass updates."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.layers[0])


class Saves(Regression):
    """Saves hyperparameters, among them a module and a function."""

    def __init__(self, width: int = 8, options: dict[str, Any] | None = None, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.save_hyperparameters({"network": self.layers[0], "function": torch.relu}, logger=False)
        self.layers = nn.Sequential(nn.Linear(4, width), activation(), nn.Linear(width, 1))


class SavesToo(Points):
    def __init__(self, note: str = "mine", sizes: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.save_hyperparameters({"loader": DataLoader, "function": torch.relu, "dataset": self.dataset()})


class Clashes(Regression):
    """Saves a hyperparameter that the DataModule saves with another value."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"note": "other"})


class Phase(Enum):
    WARM, TRAIN = "warm", "train"


@dataclass
class Schedule:
    phase: Phase
    scale: Tensor
    history: list[float]


class Pair(NamedTuple):
    low: float
    high: float


class KeepsState(Regression):
    """State of many kinds, on which the loss depends: in the ``state_dict`` and in ``on_save_checkpoint``."""

    def __init__(self) -> None:
        super().__init__()
        self.own: dict[str, Any] = {
            "schedule": Schedule(Phase.WARM, torch.ones(()), []),
            "array": np.ones(3),
            "number": np.float32(1.5),
            "seen": {0},
            "frozen": frozenset({1, 2}),
            "pair": Pair(0.5, 1.5),
            "counts": Counter(batches=0),
            "complex": 1 + 2j,
            "bytes": b"state",
        }

    def get_extra_state(self) -> Any:
        return {"steps": [0] * len(self.own["seen"]), "phase": self.own["schedule"].phase}

    def set_extra_state(self, state: Any) -> None:
        self.own["seen"], self.own["schedule"].phase = set(range(len(state["steps"]))), state["phase"]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        own, schedule = self.own, self.own["schedule"]
        own["seen"].add(len(own["seen"]))
        own["counts"]["batches"] += 1
        own["array"] *= 0.99
        schedule.phase = Phase.TRAIN if own["counts"]["batches"] > 3 else Phase.WARM
        schedule.scale *= 0.9 if schedule.phase is Phase.TRAIN else 1
        schedule.history.append(float(own["array"].sum()))
        scale = schedule.scale * sum(schedule.history) / len(own["seen"]) * own["pair"].high / own["number"].item()
        return super().training_step(batch, batch_idx) * scale

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["own"] = self.own

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        self.own = checkpoint["own"]


def has_state(run: Outcome) -> None:
    """Check that the last checkpoint has every kind of state, as it was at the last step."""
    own = torch.load(run.newest.model, weights_only=False)["own"]
    schedule = own["schedule"]
    assert (own["counts"], len(own["seen"]), len(schedule.history)) == (Counter(batches=12), 13, 12)
    assert (schedule.phase, own["pair"], own["frozen"]) == (Phase.TRAIN, Pair(0.5, 1.5), frozenset({1, 2}))
    assert isinstance(own["array"], np.ndarray) and isinstance(own["number"], np.float32)


class KeepsObject(Regression):
    """An object of a class of one's own in the checkpoint."""

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["own"] = {"reader": Lock()}


class Lock:
    """An object that a checkpoint cannot hold."""


class Gan(Regression):
    """A generator and a discriminator with an optimizer each, by manual optimization, with torch's random numbers."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        del self.layers

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        real = batch[0]
        generator, discriminator = self.optimizers()
        noise = torch.randn(len(real), 2)
        bce = nn.functional.binary_cross_entropy_with_logits
        self.toggle_optimizer(generator)
        judged = self.discriminator(self.generator(noise))
        loss = bce(judged, torch.ones_like(judged))
        self.log("train/generator", loss, sync_dist=True)
        self.manual_backward(loss)
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)
        self.toggle_optimizer(discriminator)
        judged = self.discriminator(torch.cat([real, self.generator(noise).detach()]))
        loss = bce(judged, torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)]))
        self.log("train/discriminator", loss, sync_dist=True)
        self.manual_backward(loss)
        discriminator.step()
        discriminator.zero_grad()
        self.untoggle_optimizer(discriminator)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val/real", self.discriminator(batch[0]).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.discriminator)]


class Recomputes(Regression):
    """Recomputes activations in backward, by torch's own function."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        hidden = torch.utils.checkpoint.checkpoint(self.layers[:2], x, use_reentrant=False)
        return nn.functional.mse_loss(self.layers[2](hidden), y)


class AsksTrainer(Regression):
    """Reads from the Trainer what modules usually read."""

    def on_train_start(self) -> None:
        trainer = self.trainer
        assert trainer.num_training_batches == 6 and trainer.estimated_stepping_batches == 12
        assert trainer.log_dir is not None and len(trainer.train_dataloader) == 6
        assert len(trainer.train_dataloader.dataset) == 48
        assert trainer.datamodule.batch_size == 8


class Compiled(Regression):
    """A network that ``torch.compile`` wraps; the other backends would take minutes here."""

    def configure_model(self) -> None:
        if isinstance(self.layers, nn.Sequential):  # also called before a test
            self.layers = torch.compile(self.layers, backend="eager")


class Settled(Normalized):
    """Stops to update the statistics of batch norm in the second epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 7:
            self.layers[1].eval()


def has_statistics(run: Outcome) -> None:
    """Check that batch norm has counted every step."""
    assert run.weights["layers.1.num_batches_tracked"] == 12


RANK_STATISTICS = "a rank normalizes its own half of the batch"
OWN_DROPOUT = "each rank draws its own dropout"

ROWS = (
    Row("batch norm", model=Normalized, per_rank=RANK_STATISTICS, check=has_statistics),
    Row("batch norm that a hook switches to `eval()`", model=Settled, per_rank=RANK_STATISTICS),
    Row("`sync_batchnorm`", "--trainer.sync_batchnorm true", model=Normalized, check=has_statistics),
    Row("dropout", model=Dropped, own_order="each rank seeds its own dropout", per_rank=OWN_DROPOUT),
    Row("frozen parameters", model=Frozen),
    Row("unused parameters", model=Unused, refused_late="ddp.find_unused_parameters"),
    Row("unused parameters, with `ddp.find_unused_parameters`", "--ddp.find_unused_parameters true", model=Unused),
    Row("buffers, persistent and not", model=Buffers),
    Row("tied weights", model=Tied),
    Row("spectral norm", model=Spectral),
    Row("state of many kinds: enums, dataclasses, sets, arrays, extra state", model=KeepsState, check=has_state),
    Row(
        "a hyperparameter with two values, on module and DataModule",
        model=Clashes,
        data=SavesToo,
        refused="the keys ['note'] are present in both the LightningModule's and LightningDataModule's hparams",
    ),
    Row(
        "an object of a custom class in a checkpoint",
        model=KeepsObject,
        refused_late="A checkpoint cannot hold ['own']['reader'] (foreign.modules.Lock)",
    ),
    Row("`save_hyperparameters` of anything, on module and DataModule", model=Saves, data=SavesToo),
    Row(
        "a GAN by `toggle_optimizer`",
        model=Gan,
        refused_late="ddp.find_unused_parameters",
    ),
    Row(
        "a GAN by `toggle_optimizer`, with `ddp.find_unused_parameters`",
        "--ddp.find_unused_parameters true",
        model=Gan,
        kill_step=19,
        own_order="each rank seeds its own noise",
        per_rank="each rank draws its own noise",
    ),
    Row("activations recomputed in backward", model=Recomputes),
    Row("`torch.compile` of a submodule in `configure_model`", model=Compiled),
    Row("properties of the Trainer that a module reads", model=AsksTrainer),
)
