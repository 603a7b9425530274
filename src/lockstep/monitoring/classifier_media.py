"""Log a confusion matrix and a few predictions of the classifier to W&B after each validation and test."""

import logging
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lockstep.models import Classifier
from lockstep.monitoring.wandb_logger import run_logger

log = logging.getLogger(__name__)

MAX_CLASSES = 50
"""Largest confusion matrix that is logged; a larger one does not fit on a screen."""

_SAMPLES = 8
"""Number of predictions that are shown."""


class ClassifierMedia(Callback):
    """Log ``val/confusion``, ``val/samples`` and the same for the test to W&B, each once over all restarts.

    Each rank counts its predictions; the counts are summed at the end, and rank zero logs them. Training steps cost nothing.

    Args:
        is_on: Whether W&B may be used; equal on all ranks.
    """

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on
        self._counts: Tensor | None = None  # (num_classes, num_classes): label, prediction
        self._samples: tuple[Tensor, Tensor, Tensor] | None = None  # images, labels, logits

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts = self._samples = None
        if self._is_on and isinstance(pl_module, Classifier) and pl_module.num_classes <= MAX_CLASSES:
            size = pl_module.num_classes, pl_module.num_classes
            self._counts = torch.zeros(size, dtype=torch.int64, device=pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        is_stand_in = getattr(getattr(trainer, "datamodule", None), "rank_weight", None) == 0  # its samples were skipped
        if not self._is_on or not isinstance(pl_module, Classifier) or is_stand_in:
            return
        found = _images_and_labels(batch, outputs, pl_module.num_classes)
        if found is None:
            return
        if self._counts is not None:
            count_predictions(self._counts, found[1], outputs)
        if trainer.is_global_zero and batch_idx == dataloader_idx == 0:
            images, labels = found
            self._samples = images[:_SAMPLES].clone(), labels[:_SAMPLES].clone(), outputs[:_SAMPLES].clone()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, "val")

    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, "test")

    def _log(self, trainer: Trainer, stage: str) -> None:
        """Sum the counts of all ranks, and log them on rank zero."""
        counts, samples = self._counts, self._samples
        self._counts = self._samples = None
        if trainer.sanity_checking:
            return
        if counts is not None:
            total: Any = trainer.strategy.reduce(counts, reduce_op="sum")
            counts = total.cpu()
        logger = run_logger(trainer)
        if logger is None or logger.run is None or (counts is None and samples is None):
            return
        names = class_names(getattr(trainer, "datamodule", None))
        try:
            media = make_media(counts, samples, names)
        except OSError as error:  # such as a full disk: W&B writes them to files
            log.warning("W&B cannot show predictions (%s); training continues without them", error)
            return
        logger.experiment.log({f"{stage}/{name}": value for name, value in media.items()})


def _images_and_labels(batch: Any, outputs: Any, num_classes: int) -> tuple[Tensor, Tensor] | None:
    """The images and labels of a batch; None if a subclass of the classifier has other batches or outputs."""
    if (
        not isinstance(batch, list | tuple)
        or len(batch) != 2
        or not all(isinstance(part, Tensor) for part in (*batch, outputs))
    ):
        return None
    images, labels = batch
    is_plain = labels.ndim == 1 and not labels.is_floating_point() and outputs.shape == (len(labels), num_classes)
    return (images, labels) if is_plain and len(images) == len(labels) else None


def count_predictions(counts: Tensor, labels: Tensor, logits: Tensor) -> None:
    """Add a batch to ``counts`` (C, C), without waiting for the device; labels outside 0 to C - 1 are ignored.

    Args:
        labels: (B,).
        logits: (B, C).
    """
    classes = len(counts)
    is_class = (labels >= 0) & (labels < classes)
    cells = labels.long().clamp(0, classes - 1) * classes + logits.argmax(1)
    counts.view(-1).index_add_(0, cells, is_class.long())


def make_media(
    counts: Tensor | None, samples: tuple[Tensor, Tensor, Tensor] | None, names: Sequence[str] | None
) -> dict[str, Any]:
    """W&B's media of the counts (num_classes, num_classes), and of images, labels and logits."""
    import wandb

    media: dict[str, Any] = {}
    if counts is not None:
        media["confusion"] = wandb.Html(confusion_page(counts.tolist(), names), inject=False)
    if samples is not None and samples[0].ndim == 4 and samples[0].shape[1] in (1, 3):
        images, labels, logits = (part.cpu() for part in samples)
        probabilities, predicted = logits.float().softmax(1).max(1)
        media["samples"] = [
            wandb.Image(_pixels(image), caption=f"{_name(label, names)}, predicted {_name(guess, names)} ({share:.0%})")
            for image, label, guess, share in zip(
                images, labels.tolist(), predicted.tolist(), probabilities.tolist(), strict=True
            )
        ]
    return media


def confusion_page(counts: Sequence[Sequence[int]], names: Sequence[str] | None) -> str:
    """An HTML page with the confusion matrix: one row for each label, coloured by the share of each prediction."""
    classes = range(len(counts))
    head = "".join(f"<th>{escape(_name(at, names))}</th>" for at in classes)
    lines = []
    for label, row in enumerate(counts):
        whole = max(1, sum(row))
        cells = "".join(_cell(count, count / whole, label == at) for at, count in enumerate(row))
        lines.append(f"<tr><th>{escape(_name(label, names))}</th>{cells}<td>{row[label] / whole:.1%}</td></tr>")
    style = (
        "body{font:13px sans-serif}table{border-collapse:collapse}td,th{padding:3px 7px;text-align:right}"
        "td{border:1px solid #eee}"
    )
    return (
        f'<!DOCTYPE html><meta charset="utf-8"><style>{style}</style><p>rows: labels; columns: predictions; last: recall</p>'
        f"<table><tr><th></th>{head}<th></th></tr>{''.join(lines)}</table>"
    )


def _cell(count: int, share: float, is_right: bool) -> str:
    colour = "31,119,180" if is_right else "214,39,40"
    return f'<td style="background:rgba({colour},{share:.2f})">{count or ""}</td>'


def class_names(data: Any) -> Sequence[str] | None:
    """The class names of a DataModule, if it has an attribute ``classes``."""
    names = getattr(data, "classes", None)
    return names if isinstance(names, list | tuple) else None


def _name(number: int, names: Sequence[str] | None) -> str:
    return str(names[number]) if names is not None and 0 <= number < len(names) else str(number)


def _pixels(image: Tensor) -> Any:
    """Convert an image (C, H, W) with any mean and scale to bytes: (H, W) if C is 1, else (H, W, C)."""
    low, high = image.min(), image.max()
    scaled = ((image.float() - low) / (high - low).clamp(min=1e-6) * 255).to(torch.uint8)
    return scaled.permute(1, 2, 0).squeeze(2).numpy()
