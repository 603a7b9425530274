"""A crop is decoded as if the whole image were: pure functions of bytes, then a batch for the GPU, decoded on the CPU."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchcodec.decoders import decode_image
from torchvision.transforms import v2

from lockstep.core import RunError, UsageError
from lockstep.data import decode, encoded
from lockstep.data.decode import Crop, JpegHeader, center_crop, decode_crop, random_crop, resize_crop
from lockstep.data.encoded import Decoder, EncodedBatch, EncodedCrop, check_gpu_decoding
from lockstep.data.image_folder import CorruptFile, ImageFolder

CPU = torch.device("cpu")


def picture(height: int, width: int) -> Image.Image:
    """Coarse and fine structure, so that every block of a JPEG differs."""
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8))
    noise = rng.integers(-20, 20, (height, width, 3))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    """``image`` as a JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 85, **options})
    return file.getvalue()


def whole(data: bytes, crop: Crop, size: int) -> Tensor:
    """The crop of the image that torchcodec decodes completely."""
    return resize_crop(decode_image(data, mode="RGB").permute(1, 2, 0), crop, size)


@pytest.fixture
def only_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder of whole images is not used."""
    monkeypatch.setattr(decode, "decode_pixels", None)


@pytest.mark.usefixtures("only_fast")
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"restart_marker_blocks": 3},
        {"exif": b"Exif\0\0" + jpeg(picture(16, 24))},
        {"mode": "L"},
    ],
    ids=lambda options: "-".join(f"{key}" for key in options) + str(options.get("subsampling", "")),
)
def test_the_crop_of_a_jpeg_has_the_pixels_of_the_whole_image(options: dict[str, Any]) -> None:
    mode = (options := dict(options)).pop("mode", "RGB")
    for height, width in ((120, 90), (61, 160), (17, 18)):
        data = jpeg(picture(height, width).convert(mode), **options)
        for seed in range(12):
            random.seed(seed)
            crop = random_crop(height, width)
            # As large as the crop, so that the resolution stays as it is.
            size = max(crop.height, crop.width)
            assert torch.equal(decode_crop(data, lambda *_, crop=crop: crop, size), whole(data, crop, size))


def test_rows_below_the_crop_are_not_decoded_but_the_file_must_end() -> None:
    data = jpeg(picture(160, 120))
    top = Crop(0, 0, 32, 120)
    damaged = data[: len(data) * 3 // 4] + b"\x55" * 40 + data[len(data) * 3 // 4 + 40 :]
    assert torch.equal(decode_crop(damaged, lambda *_: top, 120), whole(data, top, 120))
    for end in (len(data) - 2, len(data) * 3 // 4, 100):
        with pytest.raises(RuntimeError):
            decode_crop(data[:end], lambda *_: top, 120)


@pytest.mark.usefixtures("only_fast")
def test_a_large_crop_is_decoded_at_a_lower_resolution() -> None:
    image = picture(40, 60).resize((480, 320), Image.Resampling.BICUBIC)
    data = jpeg(image, quality=95)
    for crop, size, scale in (
        (Crop(80, 120, 200, 240), 24, 8),
        (Crop(0, 0, 320, 480, True), 80, 4),
        (Crop(33, 47, 129, 131), 64, 2),
        (Crop(33, 47, 127, 131), 64, 1),
    ):
        assert decode._scale(crop, size) == scale
        found = decode_crop(data, lambda *_, crop=crop: crop, size)
        difference = found.float() - whole(data, crop, size).float()
        assert difference.abs().mean() < 6


def test_other_images_are_decoded_whole() -> None:
    file = io.BytesIO()
    picture(40, 50).convert("L").save(file, "PNG")
    crop = Crop(3, 5, 30, 20)
    for data in (file.getvalue(), jpeg(picture(40, 50).convert("CMYK"))):
        assert torch.equal(decode_crop(data, lambda *_: crop, 16), whole(data, crop, 16))
    with pytest.raises((RuntimeError, ValueError)):
        decode_crop(b"no image", center_crop, 16)
    assert JpegHeader.read(file.getvalue()) is None and JpegHeader.read(b"\xff\xd8\xff") is None


def test_crops_are_inside_and_cover_8_to_100_percent() -> None:
    random.seed(0)
    crops = [random_crop(300, 400) for _ in range(2000)]
    assert all(c.top >= 0 <= c.left and c.top + c.height <= 300 and c.left + c.width <= 400 for c in crops)
    shares = np.array([c.height * c.width / 120_000 for c in crops])
    assert 0.07 < shares.min() < 0.1 and shares.max() > 0.9 and 0.4 < shares.mean() < 0.46  # the largest ones often do not fit
    assert 0.45 < np.mean([c.is_flipped for c in crops]) < 0.55
    assert random_crop(1, 400)[:4] == (0, 199, 1, 1) and center_crop(256, 300)[:4] == (16, 38, 224, 224)


def write_folder(root: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(4):
                (root / part / name / f"{number}.jpg").write_bytes(jpeg(picture(60 + number, 80)))


def test_a_batch_for_the_gpu_has_the_crops_of_the_cpu(tmp_path: Path) -> None:
    write_folder(tmp_path)
    picture(50, 50).save(tmp_path / "train" / "cat" / "1.png")
    batches = {}
    for on in ("cpu", "gpu"):
        random.seed(3)
        data = ImageFolder(tmp_path, size=40, batch_size=9, decode=on)
        files = data.load("train")
        batches[on] = data.collate([files[number] for number in range(9)])
    encoded_batch = batches["gpu"][0]
    assert isinstance(encoded_batch, EncodedBatch) and len(encoded_batch.others) == 1
    found, errors = encoded_batch.decode(40, CPU, [])
    assert not errors and torch.equal(batches["gpu"][1], batches["cpu"][1])
    assert (found.int() - batches["cpu"][0].int()).abs().float().mean() < 1


class Noise(nn.Module):
    """Adds noise that torch draws."""

    def forward(self, image: Tensor) -> Tensor:
        return image + torch.randint(0, 9, image.shape, dtype=torch.uint8, device=image.device)


def test_transforms_of_the_gpu_depend_on_the_seed_of_the_sample_alone() -> None:
    crops = [
        Decoder(center_crop, 16, on_gpu=True)(jpeg(picture(40 + number, 50)), lambda index: f"{index}.jpg", number)
        for number in range(3)
    ]
    seeded = [crop._replace(seed=7 + number) for number, crop in enumerate(crops) if isinstance(crop, EncodedCrop)]
    before = torch.get_rng_state()
    both, _ = EncodedBatch.collate(seeded).decode(16, CPU, [Noise(), v2.RandAugment()])
    last, _ = EncodedBatch.collate(seeded[2:]).decode(16, CPU, [Noise(), v2.RandAugment()])
    assert torch.equal(both[2:], last) and torch.equal(torch.get_rng_state(), before)
    plain = EncodedBatch.collate(crops)
    assert torch.equal(plain.decode(16, CPU, [Noise()])[0], plain.decode(16, CPU, [])[0])  # evaluation has no seeds


def test_a_jpeg_that_nvjpeg_refuses_is_decoded_by_the_cpu_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """nvJPEG is played by the CPU's decoder, which refuses one file that is whole and one that is not."""
    write_folder(tmp_path)
    data = ImageFolder(tmp_path, size=24, batch_size=4, decode="gpu", on_corrupt="skip", mixup=0.3)
    files = data.load("train")
    bad = files[1][0]  # type: ignore[index]
    assert isinstance(bad, EncodedCrop)
    bad = bad._replace(data=bad.data[: len(bad.data) // 2])
    blend = (0.5, 0.5, 0, 0, 0, 0)
    samples = [(bad if number == 1 else files[number][0], number, blend) for number in range(4)]  # type: ignore[index]
    odd = len(samples[2][0].data)
    real = encoded.decode_jpeg

    def nvjpeg(sources: list[Tensor], device: Any = None, **options: Any) -> Any:
        if device is not None and any(len(source) == odd for source in sources):
            raise RuntimeError("nvJPEG: unsupported")
        return real(sources, **options)

    monkeypatch.setattr(encoded, "decode_jpeg", nvjpeg)
    monkeypatch.setattr(ImageFolder, "_decoding_device", CPU)
    images, labels, blends = data.on_before_batch_transfer(data.collate(samples), 0)
    assert (labels.tolist(), blends.slots.tolist(), len(images)) == ([0, 2, 3], [0, 2, 3], 3)
    assert data.skipped == {str(tmp_path / "train/cat/1.jpg")}
    assert f"nvJPEG cannot decode {tmp_path / 'train/cat/2.jpg'} (unsupported); the CPU decodes it" in caplog.text
    data.on_corrupt = "raise"
    with pytest.raises(RunError, match=r"cat/1\.jpg is not a complete JPEG or PNG"):
        data.on_before_batch_transfer(data.collate(samples), 0)


def test_a_gpu_without_memory_leaves_no_jpeg_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def nvjpeg(sources: list[Tensor], **options: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory") if len(sources) == 1 else RuntimeError("nvJPEG: unsupported")

    monkeypatch.setattr(encoded, "decode_jpeg", nvjpeg)
    crop = EncodedCrop(torch.zeros(4, dtype=torch.uint8), Crop(0, 0, 8, 8), "a.jpg")
    with pytest.raises(torch.OutOfMemoryError):
        EncodedBatch.collate([crop, crop]).decode(8, CPU, [])


def test_decoding_on_the_gpu_is_refused_without_one() -> None:
    with pytest.raises(UsageError, match=r"decode: gpu needs a CUDA GPU, and this run computes on the cpu; set --data.*cpu"):
        check_gpu_decoding(CPU)


def test_a_batch_without_jpegs_needs_no_gpu(tmp_path: Path) -> None:
    data = ImageFolder(tmp_path, size=24, decode="gpu")
    images, labels, *_ = data.collate([(torch.zeros(3, 24, 24, dtype=torch.uint8), 1)] * 3)  # as lockstep plan makes one
    assert isinstance(images, Tensor) and images.shape == (3, 3, 24, 24) and labels.tolist() == [1, 1, 1]


def test_a_truncated_jpeg_is_found_before_the_gpu_has_it(tmp_path: Path) -> None:
    write_folder(tmp_path)
    broken = tmp_path / "train" / "cat" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:-400])
    rule: Callable[..., Any] = ImageFolder(tmp_path, size=24, decode="gpu").load("train").__getitem__
    assert isinstance(rule(0), CorruptFile)
