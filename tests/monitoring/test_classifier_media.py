"""The confusion matrix and the predictions that W&B shows of the shared classifier; without a run."""

from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from lockstep.models import Classifier
from lockstep.monitoring.classifier_media import MAX_CLASSES, ClassifierMedia, confusion_page, count_predictions, make_media


def test_predictions_are_counted_by_label_and_what_is_no_class_is_ignored() -> None:
    counts = torch.zeros(3, 3, dtype=torch.int64)
    logits = torch.eye(3)[[0, 0, 2, 1, 1]]
    count_predictions(counts, torch.tensor([0, 1, 2, -100, 7]), logits)
    count_predictions(counts, torch.tensor([1], dtype=torch.uint8), logits[:1])
    assert counts.tolist() == [[1, 0, 0], [2, 0, 0], [0, 0, 1]]
    page = confusion_page(counts.tolist(), ["cat", "<dog>", "owl"])
    assert "&lt;dog&gt;" in page and "<dog>" not in page
    assert "100.0%" in page and "0.0%" in page


def callback(num_classes: int, batch: Any, outputs: Any, is_on: bool = True) -> tuple[Any, Any]:
    """Counts and samples after one batch."""
    media = ClassifierMedia(is_on)
    trainer: Any = SimpleNamespace(datamodule=None, is_global_zero=True, sanity_checking=False)
    module = Classifier(torch.nn.Linear(4, num_classes), num_classes)
    media.on_validation_start(trainer, module)
    media.on_validation_batch_end(trainer, module, outputs, batch, 0)
    return media._counts, media._samples


IMAGES, LABELS = torch.rand(2, 1, 4, 4), torch.tensor([1, 0])


def test_only_batches_of_images_and_labels_are_counted() -> None:
    counts, samples = callback(2, [IMAGES, LABELS], torch.eye(2))
    assert counts.tolist() == [[0, 1], [1, 0]] and len(samples) == 3
    logits = torch.eye(2)
    own: list[tuple[Any, Any]] = [  # batches and outputs of a subclass of the classifier
        ({"image": IMAGES}, logits),
        ([IMAGES, LABELS, LABELS], logits),
        ([IMAGES, torch.eye(2)], logits),
        ([IMAGES, LABELS], torch.tensor(0.5)),
        ([IMAGES, LABELS], None),
    ]
    for batch, outputs in own:
        counts, samples = callback(2, batch, outputs)
        assert not counts.any() and samples is None
    assert callback(2, [IMAGES, LABELS], logits, is_on=False) == (None, None)
    counts, samples = callback(MAX_CLASSES + 1, [IMAGES, LABELS], torch.zeros(2, MAX_CLASSES + 1))
    assert counts is None and samples is not None


@pytest.mark.parametrize(("channels", "shown"), [(1, True), (3, True), (4, False)])
def test_samples_are_images_with_label_prediction_and_probability(channels: int, shown: bool) -> None:
    images = torch.randn(2, channels, 5, 6)
    media = make_media(None, (images, LABELS, torch.tensor([[0.0, 2.0], [0.0, 1.0]])), ["cat", "dog"])
    assert list(media) == (["samples"] if shown else [])
    if shown:
        first, second = media["samples"]
        assert (first._caption, second._caption) == ("dog, predicted dog (88%)", "cat, predicted dog (73%)")
        pixels = numpy.asarray(first.image)
        assert pixels.shape[:2] == (5, 6) and (pixels.min(), pixels.max()) == (0, 255)
