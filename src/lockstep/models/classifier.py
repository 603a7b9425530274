"""The shared LightningModule: an image classifier around any network."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import SumMetric

from lockstep.compat.lightning_epoch import is_log_step
from lockstep.compat.torchmetrics import add_to_sum, sum_on_rank
from lockstep.core import UsageError
from lockstep.models.networks import make_torchvision_model
from lockstep.models.optimizers import make_optimizer, parameter_groups
from lockstep.models.schedules import LearningRateSchedule, ScheduleName

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels, int64 (B,), or with MixUp and CutMix their probabilities, float32 (B, num_classes)."""


class ClassificationMetrics(nn.Module):
    """Mean loss and accuracy over many batches and all ranks; updates do not wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        # MeanMetric of torchmetrics 1.9 ignores weights with ``nan_strategy="disable"``, and waits for the device at each
        # update with any other strategy.
        self.loss, self.samples, self.correct = (SumMetric(nan_strategy="disable") for _ in range(3))

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss (), logits (B, num_classes) and labels (B,), or probabilities (B, num_classes).

        The label of a mixed sample is its most probable class.
        """
        samples = labels.shape[0]  # ``len`` is five times slower
        add_to_sum(self.loss, loss.detach().float() * samples)
        add_to_sum(self.samples, samples)
        labels = labels.argmax(1) if labels.ndim == 2 else labels
        add_to_sum(self.correct, (logits.detach().argmax(1) == labels).sum())

    def reduce_and_reset(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Numbers of samples and of correct predictions, loss and accuracy since the last reset, each (); then reset.

        ``reduce`` returns the sum of a tensor over all ranks. It is called once, where torchmetrics would gather three times.
        """
        metrics = self.samples, self.correct, self.loss
        samples, correct, loss = reduce(torch.stack([sum_on_rank(metric) for metric in metrics])).unbind()
        for metric in metrics:
            metric.reset()
        return {"samples": samples, "correct": correct, "loss": loss / samples, "accuracy": correct / samples}


class Classifier(LightningModule):
    """Trains any network to classify images.

    Logs ``train/loss`` and ``train/accuracy`` over the steps since they were last logged, ``val/…`` and ``test/…`` over the
    whole set, all of them over all ranks.

    Args:
        network: Name of a torchvision classification model (``resnet50``), or any ``nn.Module`` by class path. It takes
            images (B, C, H, W) and returns logits (B, num_classes).
        num_classes: Outputs of the network.
        network_args: Further arguments for a torchvision model, such as ``weights`` or ``dropout``.
        criterion: Loss of logits (B, num_classes) and labels (B,), averaged over the batch; cross entropy by default. With
            MixUp and CutMix, labels are probabilities (B, num_classes).
            For label smoothing: ``--model.criterion torch.nn.CrossEntropyLoss --model.criterion.label_smoothing 0.1``.
        optimizer: ``adamw``, ``sgd`` or the class path of an optimizer.
        lr: Learning rate after the warm-up; must be greater than 0.
        weight_decay: Weight decay of matrices and filters; biases and norms have none.
        optimizer_args: Further arguments of the optimizer, such as ``{momentum: 0.9}``.
        schedule: Learning-rate schedule after the warm-up.
        warmup_steps: Optimizer steps of linear warm-up.
        final_lr: With ``cosine``: learning rate at the end, as a fraction of ``lr``.
        step_size: With ``step``: optimizer steps between two decays.
        gamma: With ``step``: factor of each decay.
        channels_last: Keep images and filters in channels-last memory format; faster convolutions on GPUs.
        compile: Compile the network with ``torch.compile``.

    Raises:
        UsageError: A value is out of range, or the network cannot be created.
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
            raise UsageError(f"model.lr: {lr} must be greater than 0.")
        self.schedule = LearningRateSchedule(schedule, warmup_steps, final_lr, step_size, gamma)
        self.num_classes = num_classes
        if isinstance(network, str):
            network = make_torchvision_model(network, num_classes, network_args or {})
        elif network_args:
            raise UsageError(
                "model.network_args is only for a torchvision model by name; set model.network.init_args for a class path."
            )
        self.network = network
        # Searching the network in each step takes longer than a small layer. An assignment would register the weight twice.
        vars(self)["_weight"] = next((p for p in network.parameters() if p.is_floating_point()), None)
        self.criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.optimizer_name, self.optimizer_args = optimizer, optimizer_args or {}
        self.lr, self.weight_decay = lr, weight_decay
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        if compile:
            self.network.compile()  # in place, so that the names in a checkpoint do not change
        self.scores = nn.ModuleDict({f"{stage}_scores": ClassificationMetrics() for stage in ("train", "val", "test")})

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``images`` (B, C, H, W)."""
        # ZeRO converts the weights without notifying the module.
        dtype = torch.float32 if (weight := vars(self)["_weight"]) is None else weight.dtype
        logits: Tensor = self.network(images.to(dtype=dtype, memory_format=self.memory_format))
        return logits

    def setup(self, stage: str) -> None:
        """Raise UsageError if the network has fewer outputs than the data has classes."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if classes is not None and classes > self.num_classes:
            raise UsageError(
                f"model.num_classes: {self.num_classes} outputs are too few for the {classes} classes of the data; "
                f"set --model.num_classes {classes}."
            )

    def _score(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        """Count a batch; return its mean loss () and logits (B, num_classes)."""
        images, labels = batch
        logits = self._logits(images)
        loss: Tensor = self.criterion(logits, labels)
        self._scores(stage).update(loss, logits, labels)
        return loss, logits

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self(images)
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise UsageError(
                f"model.network: {type(self.network).__name__} returns {tuple(logits.shape)} for {len(images)} images; "
                f"model.num_classes: {self.num_classes} needs ({len(images)}, {self.num_classes})."
            )
        return logits

    def on_train_start(self) -> None:
        """Keep the sums in float32 if DeepSpeed has converted the module to bfloat16 or float16."""
        for stage in ("train", "val", "test"):
            scores = self._scores(stage)
            for metric in (scores.loss, scores.samples, scores.correct):
                metric.set_dtype(torch.float32)

    on_validation_start = on_test_start = on_train_start

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss () of this rank's slice of a global batch."""
        return self._score(batch, "train")[0]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy since the last log, every ``log_every_n_steps`` steps."""
        if is_log_step(self.trainer):
            self._log_scores("train")

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits (B, num_classes), for callbacks."""
        return self._score(batch, "val")[1]

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits (B, num_classes), for callbacks."""
        return self._score(batch, "test")[1]

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def predict_step(self, batch: Tensor | Sequence[Any], batch_idx: int) -> Tensor:
        """Class probabilities, float32 (B, num_classes); ``batch`` is images (B, C, H, W), or a sequence of them and more."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self._logits(images).float().softmax(1)

    def _log_scores(self, stage: str) -> None:
        values = self._scores(stage).reduce_and_reset(partial(self.trainer.strategy.reduce, reduce_op="sum"))
        if stage != "test":
            del values["samples"], values["correct"]
        # The values are equal on all ranks: the maximum changes nothing, and Lightning does not warn.
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, reduce_fx="max", sync_dist=stage != "train")

    def _scores(self, stage: str) -> ClassificationMetrics:
        scores = self.scores[f"{stage}_scores"]
        assert isinstance(scores, ClassificationMetrics)
        return scores

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and the learning-rate schedule, stepped after every optimizer step."""
        trainer = self.trainer
        # A fused update unscales fp16 gradients itself, too late to clip them or to log their norm. With bf16, Lightning does
        # not clip for a fused optimizer either.
        fused = trainer.precision != "16-mixed" and not (trainer.precision == "bf16-mixed" and trainer.gradient_clip_val)
        total = trainer.estimated_stepping_batches
        scale = getattr(getattr(trainer, "datamodule", None), "lr_scale", 1)
        lr, schedule = self.lr * scale, self.schedule
        if scale > 1:
            schedule = replace(schedule, warmup_steps=max(schedule.warmup_steps, self._scaled_warmup(total)))
            text = "lr %g for one rank's batch: scaled to %g for %d ranks, %d warm-up steps"
            log.info(text, self.lr, lr, scale, schedule.warmup_steps)
        groups = parameter_groups(self, self.weight_decay)
        optimizer = make_optimizer(self.optimizer_name, groups, lr, fused, self.optimizer_args)
        factor = schedule.factor(total, warmup_start=1 / scale if scale > 1 else 0.0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
        }

    def _scaled_warmup(self, total: float) -> int:
        """Optimizer steps of five epochs (Goyal et al. 2017, section 2.2), at most a tenth of the run."""
        batches = self.trainer.num_training_batches
        if batches == float("inf"):
            return int(min(total, 10_000) // 10)
        return int(min(5 * batches // self.trainer.accumulate_grad_batches, total // 10))
