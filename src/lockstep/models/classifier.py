"""The shared LightningModule: an image classifier around any network."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from lockstep.compat.lightning import is_log_step
from lockstep.core import UsageError, did_you_mean
from lockstep.models.optimizers import make_optimizer, parameter_groups
from lockstep.models.schedules import ScheduleName, learning_rate_factor

log = logging.getLogger(__name__)


Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels (B,)."""


class ClassificationMetrics(nn.Module):
    """Loss and accuracy over many batches and all ranks, each sample counted once; no wait for the device until asked.

    Args:
        num_classes: Outputs of the network.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # Not a MeanMetric: torchmetrics 1.9's forgets the weights with ``nan_strategy="disable"``, and with any other it
        # waits for the device at each update.
        self.loss, self.samples = SumMetric(nan_strategy="disable"), SumMetric(nan_strategy="disable")
        self.accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss (), logits (B, num_classes) and labels (B,)."""
        self.loss.update(loss.detach().float() * len(labels))
        self.samples.update(len(labels))
        self.accuracy.update(logits.detach(), labels)

    def compute_and_reset(self) -> dict[str, Tensor]:
        """Loss and accuracy since the last call, over all ranks (every rank must call), and start again."""
        values = {"loss": self.loss.compute() / self.samples.compute(), "accuracy": self.accuracy.compute()}
        self.reset()
        return values

    def counts(self) -> dict[str, Tensor]:
        """How many samples were seen and how many were right, over all ranks (every rank must call)."""
        with self.accuracy.sync_context(should_sync=torch.distributed.is_initialized()):
            right = torch.as_tensor(self.accuracy.tp).sum()
        return {"samples": self.samples.compute(), "correct": right.double()}

    def reset(self) -> None:
        """Forget all batches."""
        self.loss.reset()
        self.samples.reset()
        self.accuracy.reset()


class Classifier(LightningModule):
    """Trains a network to tell classes of images apart. Everything that differs between experiments is an argument.

    Logs ``train/loss`` and ``train/accuracy`` over the steps since they were last logged, ``val/…`` and ``test/…`` over
    the whole set; all of them over all ranks.

    Args:
        network: Name of a torchvision classification model (``resnet50``), or any ``nn.Module`` by class path. It takes
            images (B, C, H, W) and returns logits (B, num_classes).
        num_classes: Outputs of the network.
        network_args: Further arguments for a torchvision model, such as ``weights`` or ``dropout``.
        criterion: Loss of logits (B, num_classes) and labels (B,), averaged over the batch; cross entropy by default.
            Label smoothing is its argument: ``--model.criterion.label_smoothing 0.1``.
        optimizer: ``adamw``, ``sgd`` or the class path of an optimizer.
        lr: Learning rate, reached after the warm-up.
        weight_decay: Weight decay of matrices and filters; biases and norms have none.
        optimizer_args: Further arguments of the optimizer, such as ``{momentum: 0.9}``.
        schedule: How the learning rate falls after the warm-up.
        warmup_steps: Optimizer steps of linear warm-up.
        final_lr: With ``cosine``: the learning rate at the end, as a part of ``lr``.
        step_size: With ``step``: optimizer steps between two falls.
        gamma: With ``step``: factor of one fall.
        channels_last: Keep images and filters in channels-last memory format; faster convolutions on GPUs.
        compile: Compile the network with ``torch.compile``.
    """

    def __init__(
        self,
        network: nn.Module | str = "resnet18",
        num_classes: int = 10,
        network_args: dict[str, Any] | None = None,
        criterion: nn.Module | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        optimizer_args: dict[str, Any] | None = None,
        schedule: ScheduleName = "cosine",
        warmup_steps: int = 0,
        final_lr: float = 0.0,
        step_size: int | None = None,
        gamma: float = 0.1,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise UsageError(f"model.lr: {lr} must be more than 0.")
        # Found here, before any data is prepared; configure_optimizers builds it again with the length of the run.
        learning_rate_factor(schedule, warmup_steps, total_steps=1, step_size=step_size)
        if isinstance(network, nn.Module) and network_args:
            raise UsageError("model.network_args goes with the name of a torchvision model; give a class path init_args.")
        self.num_classes = num_classes
        self.network = (
            network if isinstance(network, nn.Module) else make_torchvision_model(network, num_classes, network_args or {})
        )
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.optimizer_name, self.optimizer_args = optimizer, optimizer_args or {}
        self.lr, self.weight_decay = lr, weight_decay
        self.schedule, self.warmup_steps, self.final_lr = schedule, warmup_steps, final_lr
        self.step_size, self.gamma = step_size, gamma
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        if compile:
            self.network.compile()  # in place: the names in a checkpoint stay as they are
        self.scores = nn.ModuleDict(
            {f"{stage}_scores": ClassificationMetrics(num_classes) for stage in ("train", "val", "test")}
        )

    @property
    def _input_dtype(self) -> torch.dtype:
        """That of the network's weights, which ZeRO may have made smaller than the module knows."""
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, C, H, W)."""
        logits: Tensor = self.network(images.to(dtype=self._input_dtype, memory_format=self.memory_format))
        return logits

    def setup(self, stage: str) -> None:
        """Check that the data's classes fit the outputs."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if classes is not None and classes > self.num_classes:
            raise UsageError(
                f"model.num_classes: {self.num_classes} outputs are too few for the {classes} classes of the data; "
                f"set --model.num_classes {classes}."
            )

    def _score(self, batch: Batch, stage: str) -> Tensor:
        images, labels = batch
        logits = self._logits(images)
        loss: Tensor = self.criterion(logits, labels)
        self._scores(stage).update(loss, logits, labels)
        return loss

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self(images)
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise UsageError(
                f"model.network: {type(self.network).__name__} returns {tuple(logits.shape)} for {len(images)} images; "
                f"model.num_classes: {self.num_classes} needs ({len(images)}, {self.num_classes})."
            )
        return logits

    def on_train_start(self) -> None:
        """Keep sums exact where the weights are bfloat16 or float16."""
        self._count_in_float32()

    def on_validation_start(self) -> None:
        """Keep sums exact where the weights are bfloat16 or float16."""
        self._count_in_float32()

    def on_test_start(self) -> None:
        """Keep sums exact where the weights are bfloat16 or float16."""
        self._count_in_float32()

    def _count_in_float32(self) -> None:
        for stage in ("train", "val", "test"):
            scores = self._scores(stage)
            scores.loss.set_dtype(torch.float32)
            scores.samples.set_dtype(torch.float32)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss () of this rank's part of a global batch."""
        return self._score(batch, "train")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy of the steps since the last time, at every ``log_every_n_steps`` only."""
        if is_log_step(self.trainer):
            self._log_scores("train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a batch of the validation set."""
        self._score(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy of the validation set."""
        self._log_scores("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a batch of the test set."""
        self._score(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log loss, accuracy and the counts of the test set."""
        self._log_on_all_ranks("test", self._scores("test").counts())
        self._log_scores("test")

    def predict_step(self, batch: Tensor | Sequence[Any], batch_idx: int) -> Tensor:
        """Probability of each class, float32 (B, num_classes), of images alone or with anything behind them."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self._logits(images).float().softmax(1)

    def _log_scores(self, stage: str) -> None:
        self._log_on_all_ranks(stage, self._scores(stage).compute_and_reset())

    def _log_on_all_ranks(self, stage: str, values: dict[str, Tensor]) -> None:
        # The ranks agree already: the maximum is the value itself, and lightning is content.
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, reduce_fx="max", sync_dist=stage != "train")

    def _scores(self, stage: str) -> ClassificationMetrics:
        scores = self.scores[f"{stage}_scores"]
        assert isinstance(scores, ClassificationMetrics)
        return scores

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and its schedule as a factor per optimizer step."""
        trainer = self.trainer
        # A fused update unscales fp16 gradients inside itself: too late to clip them or to know their norm. lightning does not
        # clip with bf16 either.
        fused = trainer.precision != "16-mixed" and not (trainer.precision == "bf16-mixed" and trainer.gradient_clip_val)
        total = trainer.estimated_stepping_batches
        scale = getattr(getattr(trainer, "datamodule", None), "lr_scale", 1)
        warmup = self.warmup_steps
        if scale > 1:
            warmup = max(warmup, self._scaled_warmup(total))
            log.info(
                "lr %g for one rank's batch: scaled to %g for %d ranks, %d warm-up steps",
                self.lr,
                self.lr * scale,
                scale,
                warmup,
            )
        groups = parameter_groups(self, self.weight_decay)
        optimizer = make_optimizer(self.optimizer_name, groups, self.lr * scale, fused, self.optimizer_args)
        factor = learning_rate_factor(
            self.schedule, warmup, 1 / scale if scale > 1 else 0.0, total, self.final_lr, self.step_size, self.gamma
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
        }

    def _scaled_warmup(self, total: float) -> int:
        """Five epochs of steps, but no more than a tenth of the run (Goyal et al. 2017, section 2.2)."""
        batches = self.trainer.num_training_batches
        if batches == float("inf"):
            return int(min(total, 10_000) // 10)
        return int(min(5 * batches // self.trainer.accumulate_grad_batches, total // 10))


def make_torchvision_model(name: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    """The torchvision classification model called ``name`` with ``num_classes`` outputs.

    Raises:
        UsageError: No such model, or it does not take one of the arguments.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if "." in name:
        raise UsageError(f"model.network: {name!r} is not the import path of an nn.Module, nor a torchvision model's name.")
    if name not in names:
        raise UsageError(f"model.network: torchvision has no classification model {name!r}{did_you_mean(name, names)}")
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads return a tuple while training.
        arguments = {"aux_logits": False, "init_weights": True, **arguments}
    try:
        model: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.network_args: torchvision's {name} says: {error}.") from None
    return model
