"""Augmentation is a function of (seed, epoch, position): batches of one process, of all ranks, then real runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.faults import fault
from support.runs import Launch, assert_same_run, resume_run
from torch import Tensor, nn
from torchvision.transforms import v2

from lockstep.config.checks import check_batch_size, check_data
from lockstep.core import UsageError, World
from lockstep.data.augment import AugmentedSamples, Blend, Blends, Mixing, mix
from lockstep.data.base import ImageData
from lockstep.data.digits import Digits
from lockstep.data.image_folder import ImageFolder
from lockstep.data.loading.sampling import DataPosition
from lockstep.data.loading.sharding import DataSharding
from lockstep.models.classifier import ClassificationMetrics

MIXED: dict[str, Any] = {"mixup": 0.4, "cutmix": 1.0}


def batches(data: ImageData, ranks: int = 1, used: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The batches of the third epoch as the model gets them, each joined from all ranks."""
    joined: list[Any] = []
    for rank in range(ranks):
        sharding = DataSharding(World(rank, ranks, rank, ranks), 5)
        loader = sharding.shard(data.train_dataloader(), is_training=True, epoch=lambda: 2)
        with loader.global_batches.starting_at(DataPosition(2, used=used)):
            parts = [data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0) for batch in loader]
        joined.append(parts)
    return [tuple(torch.cat(each) for each in zip(*parts, strict=True)) for parts in zip(*joined, strict=True)]  # type: ignore[misc]


def assert_same_batches(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert all(map(torch.equal, one, other))


def test_pairs_are_mixed_alike_on_1_2_and_4_ranks_and_after_a_restart() -> None:
    data = Digits(batch_size=160, augment=True, transforms=[v2.RandomErasing(p=0.5, value=128)], **MIXED)
    data.setup("fit")
    one = batches(data)
    for ranks in (2, 4):
        assert_same_batches(batches(data, ranks), one)
    assert_same_batches(batches(data, 2, used=320), one[2:])
    labels = torch.cat([labels for _, labels in one])
    assert labels.shape == (1280, 10) and torch.allclose(labels.sum(1), torch.ones(1280))
    assert 0.1 < (labels.max(1).values < 0.9).float().mean() < 0.9
    plain = Digits(batch_size=160, augment=True, transforms=[v2.RandomErasing(p=0.5, value=128)])
    plain.setup("fit")
    for (images, soft), (unmixed, hard) in zip(one, batches(plain), strict=True):
        partners = unmixed.reshape(-1, 2, *unmixed.shape[1:]).flip(1).flatten(0, 1)
        is_between = (images >= torch.minimum(unmixed, partners) - 1e-5) & (images <= torch.maximum(unmixed, partners) + 1e-5)
        assert is_between.all() and ((soft > 0).sum(1) <= 2).all() and (soft.gather(1, hard[:, None]) >= 0).all()
    data.setup("validate")
    images, labels = next(iter(data.val_dataloader()))
    assert labels.dtype == torch.int64 and images.dtype == torch.uint8


def test_cutmix_replaces_a_box_and_its_share_of_the_label() -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    drawn = [Blend(0.75, 1.0, 0, 0, 2, 2), Blend(0.1, 0.1), Blend(0.3, 0.3)]
    mixed, labels = mix(images, torch.tensor([0, 1, 2]), Blends.collate(drawn, [2, 3, 5]), 3)
    assert (mixed[0, :, :2, :2] == 1).all() and mixed[0].sum() == 8 and mixed[1].sum() == 24
    assert labels.tolist() == [[0.75, 0.25, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]
    assert torch.allclose(mixed[2], images[2])  # its neighbour is missing
    for _ in range(200):
        blend = Mixing(0.0, 1.0, 6, 9).draw()
        area = (blend.bottom - blend.top) * (blend.right - blend.left)
        assert blend.share == pytest.approx(1 - area / 54) and 0 <= blend.top <= blend.bottom <= 6 >= 0 <= blend.right <= 9


def test_transforms_are_the_same_in_any_number_of_workers_and_ranks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(4):
            image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
            image.save(tmp_path / "train" / name / f"{number}.jpg")
    transforms: list[nn.Module] = [v2.RandAugment(), v2.TrivialAugmentWide(), v2.RandomErasing(value=[124, 116, 104])]
    found = []
    for workers, ranks in ((0, 1), (1, 1), (0, 2)):
        data = ImageFolder(tmp_path, size=16, batch_size=4, num_workers=workers, transforms=transforms, **MIXED)
        data.num_classes, data._datasets["train"] = 2, data.load("train")
        found.append(batches(data, ranks))
    assert_same_batches(found[1], found[0])
    assert_same_batches(found[2], found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"transforms": [v2.MixUp(alpha=0.2)]},
            r"transforms: MixUp mixes the samples of a batch.* set --data.mixup 0.2",
        ),
        ({"mixup": -0.1}, r"data.mixup: -0.1 must be 0 .off. or greater"),
        ({"cutmix": 1.0, "drop_last": False}, r"data.cutmix: 1.0 mixes pairs, .* set data.drop_last: true"),
        ({"mixup": 0.2, "batch_size": 63}, r"data.batch_size: 63 gives each of 1 ranks an odd number .* use 64"),
        ({"mixup": 0.2, "batch_size_per_rank": 3}, r"data.batch_size: 3 gives each of 1 ranks an odd number .* use 4"),
    ],
)
def test_what_cannot_be_mixed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Digits(**options).setup("fit")
    config = {"class_path": "lockstep.data.Digits", "init_args": options}
    if "transforms" not in options and "batch_size_per_rank" not in options:
        with pytest.raises(UsageError, match=message):  # without torch, at submission
            check_data(config)
            check_batch_size(config, [1])


def test_the_time_to_read_files_is_counted_through_the_augmentation(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (40, 50)).save(tmp_path / "train" / "cat" / "0.jpg")
    files = ImageFolder(tmp_path, size=16).load("train")
    samples = AugmentedSamples(files, [], None)
    assert samples.read_seconds == 0
    samples[0]
    assert samples.read_seconds == files.read_seconds > 0


def test_null_mixes_nothing() -> None:
    options: dict[str, Any] = {"mixup": None, "cutmix": None}
    check_data({"class_path": "lockstep.data.Digits", "init_args": options})
    assert Digits(**options).mixup == 0


def test_accuracy_counts_the_most_probable_class_of_a_mixed_sample() -> None:
    metrics = ClassificationMetrics()
    metrics.update(torch.tensor(0.5), torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.tensor([[0.3, 0.7], [0.4, 0.6]]))
    assert metrics.reduce_and_reset(lambda total: total)["accuracy"] == 0.5


def test_a_run_with_mixed_samples_is_the_same_on_two_ranks_and_after_a_kill(launch: Launch, tmp_path: Path) -> None:
    arguments = (
        *(
            "--checkpoint.every_n_steps",
            "2",
            "--trainer.max_steps",
            "8",
            "--trainer.log_every_n_steps",
            "1",
            "--run.test_after_fit",
            "false",
        ),
        *("--data.augment", "true", "--data.mixup", "0.4", "--data.cutmix", "1.0"),
        "--data.transforms+=torchvision.transforms.v2.RandomErasing",
    )
    one, two = (launch(*arguments, "--ranks", ranks) for ranks in ("1", "2"))
    assert two.series("train/loss") == pytest.approx(one.series("train/loss"), abs=1e-4)
    assert two.series("train/accuracy") == one.series("train/accuracy")
    killed = launch(*arguments, "--ranks", "2", *fault(tmp_path / "once", "SIGKILL", step=5, rank=1))
    assert killed.status == 1
    assert_same_run(resume_run(launch, killed), two)
