"""DataModules read real files of their formats, made here: idx, CIFAR batches, folders of JPEG and PNG, archives."""

import functools
import gzip
import hashlib
import http.server
import itertools
import pickle
import shutil
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from lockstep.core.errors import UsageError
from lockstep.data.base import split_indices
from lockstep.data.digits import Digits
from lockstep.data.downloaded import CIFAR10, MNIST
from lockstep.data.image_folder import ImageFolder
from lockstep.data.synthetic import Synthetic


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log line for each request."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its URL on a local web server."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a gzipped MNIST file: magic number, sizes, bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def tiny_mnist(folder: Path, address: str) -> type[MNIST]:
    """MNIST with 60 training and 20 test images, from a local server, with the checksums of these files."""
    rng = np.random.default_rng(0)
    resources = []
    for part, samples in (("train", 60), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (samples, 28, 28))),
            ("labels-idx1", np.arange(samples) % 10),
        ):
            path = folder / f"{part}-{kind}-ubyte.gz"
            write_idx(path, array)
            resources.append((path.name, md5(path)))
    source = type("MNIST", (torchvision.datasets.MNIST,), {"mirrors": [address], "resources": resources})
    return type("MNIST", (MNIST,), {"source": source})


def test_mnist_is_downloaded_verified_and_split(server: tuple[Path, str], tmp_path: Path) -> None:
    data = tiny_mnist(*server)(root=tmp_path / "data", val_samples=10, batch_size=25, augment=True)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert [len(getattr(data, f"{split}_dataloader")().dataset) for split in ("train", "val", "test")] == [50, 10, 20]
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((25, 1, 28, 28), torch.uint8, torch.int64)
    shutil.rmtree(server[0])
    data.prepare_data()
    assert data.test_dataloader().dataset[3][1] == 3


def test_a_wrong_checksum_raises_error_and_leaves_no_folder(server: tuple[Path, str], tmp_path: Path) -> None:
    data = tiny_mnist(*server)(root=tmp_path / "data")
    (server[0] / "t10k-labels-idx1-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(UsageError, match=r"data.root: .*mnist is missing and could not be prepared"):
        data.prepare_data()
    assert not (tmp_path / "data" / "mnist").exists()


def test_download_without_a_server_raises_error_with_the_remedy(tmp_path: Path) -> None:
    source = type("MNIST", (torchvision.datasets.MNIST,), {"mirrors": ["http://127.0.0.1:9/"]})
    data = type("MNIST", (MNIST,), {"source": source})(root=tmp_path)
    with pytest.raises(
        UsageError, match=r"on another machine, run python -c .*MNIST\(root=.*, which makes data/mnist, and copy the folder"
    ):
        data.prepare_data()


@pytest.mark.parametrize("content", [None, b"", bytes(40)])
def test_a_damaged_folder_raises_error_with_the_remedy(tmp_path: Path, content: bytes | None) -> None:
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    if content is not None:
        for part, kind in itertools.product(("train", "t10k"), ("images-idx3", "labels-idx1")):
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    data = MNIST(root=tmp_path)
    data.prepare_data()
    with pytest.raises(UsageError, match=r"is damaged \(.+\); remove the folder to download it again"):
        data.setup("fit")


def tiny_cifar10(folder: Path, address: str) -> type[CIFAR10]:
    """CIFAR-10 with 5 × 12 training and 10 test images, in its archive format."""
    rng = np.random.default_rng(0)
    inner = folder / "cifar-10-batches-py"
    inner.mkdir()
    names = {"train_list": [f"data_batch_{i}" for i in range(1, 6)], "test_list": ["test_batch"]}
    lists: dict[str, Any] = {}
    for key, files in names.items():
        for name in files:
            samples = 12 if key == "train_list" else 10
            content = {
                "data": rng.integers(0, 256, (samples, 3072), dtype=np.uint8),
                "labels": [i % 10 for i in range(samples)],
            }
            (inner / name).write_bytes(pickle.dumps(content))
        lists[key] = [[name, md5(inner / name)] for name in files]
    (inner / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(inner / "batches.meta")}
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inner, arcname=inner.name)
    shutil.rmtree(inner)
    fields = {"url": address + archive.name, "tgz_md5": md5(archive), "meta": meta, **lists}
    return type("CIFAR10", (CIFAR10,), {"source": type("CIFAR10", (torchvision.datasets.CIFAR10,), fields)})


def test_cifar10_is_downloaded_verified_and_split(server: tuple[Path, str], tmp_path: Path) -> None:
    data = tiny_cifar10(*server)(root=tmp_path / "data", val_samples=10, batch_size=25)
    data.prepare_data()
    data.setup("fit")
    assert set(data._datasets) == {"train", "val"}
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.shape) == ((25, 3, 32, 32), torch.uint8, (25,))


def write_images(root: Path) -> None:
    """Write grey and colour JPEG and PNG files of different sizes, a text file, and a folder inside each class folder."""
    for part in ("train", "val", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = root / part / name
            (folder / "more").mkdir(parents=True)
            shade = 60 + 120 * label
            Image.new("RGB", (40, 30), (shade, shade, shade)).save(folder / "a.jpg")
            Image.new("L", (30, 50), shade).save(folder / "b.JPEG", format="JPEG")
            Image.new("RGBA", (64, 64), (shade, shade, shade, 255)).save(folder / "c.png")
            Image.new("L", (33, 47), shade).save(folder / "more" / "d.png")
            (folder / "notes.txt").write_text("no image")


def test_folders_of_jpeg_and_png(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = ImageFolder(root=tmp_path, size=16, batch_size=8)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    assert data.num_classes == 2
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        (batch,) = list(loader)
        images, labels = data.on_before_batch_transfer(batch, 0)
        assert (images.shape, images.dtype) == ((8, 3, 16, 16), torch.uint8)
        brightness = images.float().mean(dim=(1, 2, 3))
        assert (brightness - (60 + 120 * labels)).abs().max() < 3


@pytest.mark.parametrize(
    ("address", "md5", "is_accepted"),
    [
        ("http://host/images.tar", None, False),
        ("ftp://host/images.tar", None, False),
        ("http://host/images.tar", "0" * 32, True),
        ("https://host/images.tar", None, True),
        ("/data/images.tar", None, True),
    ],
)
def test_an_archive_over_http_needs_a_checksum(address: str, md5: str | None, is_accepted: bool) -> None:
    if is_accepted:
        assert ImageFolder(archive=address, archive_md5=md5, batch_size=4).archive == address
    else:
        with pytest.raises(UsageError, match=r"data\.archive: .*host.* use https, or set data\.archive_md5"):
            ImageFolder(archive=address, archive_md5=md5, batch_size=4)


def test_hidden_files_and_loops_of_links_are_neither_classes_nor_samples(tmp_path: Path) -> None:
    write_images(tmp_path)
    train = tmp_path / "train"
    data = ImageFolder(root=tmp_path, size=16)
    files = data.load("train").samples
    for hidden in (train / ".ipynb_checkpoints", train / "cat" / ".cache", train / "cat" / "more" / ".trash"):
        hidden.mkdir()
        (hidden / "a.jpg").touch()
    (train / "cat" / "._a.jpg").touch()
    (train / "again").symlink_to(train)
    (train / "all").symlink_to(tmp_path)
    (train / "itself").symlink_to("itself")
    (train / "cat" / "up").symlink_to("..")
    (train / "cat" / "other").symlink_to(tmp_path / "more")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "back").symlink_to(train / "cat")
    found = data.load("train")
    assert (found.classes, found.samples) == (["cat", "dog"], files)
    shutil.copy(train / "cat" / "a.jpg", tmp_path / "more" / "linked.jpg")
    assert len(data.load("train")) == len(files) + 1


@pytest.mark.parametrize("source", ["path", "address"])
def test_an_archive_is_unpacked_once(server: tuple[Path, str], tmp_path: Path, source: str) -> None:
    write_images(tmp_path / "images")
    archive = server[0] / "images.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "images", arcname=".")
    place = str(archive) if source == "path" else server[1] + archive.name
    data = ImageFolder(root=tmp_path / "unpacked", archive=place, archive_md5=md5(archive), batch_size=4)
    data.prepare_data()
    data.prepare_data()
    assert {path.name for path in (tmp_path / "unpacked").iterdir()} == {"train", "val", "test"}
    wrong = ImageFolder(root=tmp_path / "other", archive=place, archive_md5="0" * 32)
    with pytest.raises(UsageError, match="could not be prepared"):
        wrong.prepare_data()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz", "images.tar.xz", "images.zip"])
def test_a_truncated_archive_is_named(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "images")
    kind = {"images.tar": "tar", "images.tar.gz": "gztar", "images.tar.xz": "xztar", "images.zip": "zip"}[name]
    archive = Path(shutil.make_archive(str(tmp_path / "images"), kind, tmp_path / "images"))
    archive.write_bytes(archive.read_bytes()[:700])
    with pytest.raises(UsageError, match=rf"^data\.root: .*/unpacked is missing .*/{name} is damaged"):
        ImageFolder(root=tmp_path / "unpacked", archive=str(archive)).prepare_data()


def test_a_test_set_that_lacks_a_class_raises_error(tmp_path: Path) -> None:
    write_images(tmp_path)
    shutil.rmtree(tmp_path / "test" / "cat")
    with pytest.raises(UsageError, match="have different classes: cat only in one of them"):
        ImageFolder(root=tmp_path).setup("test")


def test_digits_are_complete_and_their_test_set_is_the_same_for_every_seed() -> None:
    images = {}
    for seed in (1, 2):
        data = Digits(seed=seed)
        images[seed] = {"train": data.load("train").images, "val": data.load("val").images, "test": data.load("test").images}
    assert [len(images[1][split]) for split in ("train", "val", "test")] == [1280, 157, 360]
    assert torch.equal(images[1]["test"], images[2]["test"])
    assert not torch.equal(images[1]["val"], images[2]["val"])
    one, two = (torch.cat([images[seed][split] for split in ("train", "val", "test")]).flatten(1) for seed in (1, 2))
    assert torch.equal(one[one.double().mul(torch.arange(1, 65) ** 2.5).sum(1).argsort()].sum(0), two.sum(0))
    batch = data.on_after_batch_transfer((images[1]["train"], torch.zeros(1280)), 0)[0]
    assert batch.dtype == torch.float32
    assert (abs(float(batch.mean())) < 0.02) and (abs(float(batch.std()) - 1) < 0.02)


def test_synthetic_has_any_shape_and_number_of_classes() -> None:
    data = Synthetic(shape=(2, 5, 7), classes=3, train_samples=700, val_samples=10, batch_size=600)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((600, 2, 5, 7), torch.uint8)
    assert set(labels.tolist()) == {0, 1, 2}
    with pytest.raises(UsageError, match=r"data.train_samples: 0 must be 1 or more"):
        Synthetic(train_samples=0)


def test_the_split_is_drawn_from_the_seed_and_uses_every_sample() -> None:
    train, val = split_indices(60_000, 5_000, 3, "train"), split_indices(60_000, 5_000, 3, "val")
    assert (len(train), len(val)) == (55_000, 5_000)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(60_000))
    assert not torch.equal(val, split_indices(60_000, 5_000, 4, "val"))
    with pytest.raises(UsageError, match=r"data.val_samples: 60 must be between 1 and 59"):
        split_indices(60, 60, 0, "val")
