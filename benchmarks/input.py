"""Images per second that one core reads, decodes, crops at random and collates, in the usual ways and in lockstep's.

    python benchmarks/input.py [--images 768] [--rounds 5] [--rows tutorial "lockstep folders" …]

All rows read the same JPEGs, 500×375 of about 66 kB, crop them at random to 224×224 and flip half of them, in batches of 64,
with one DataLoader worker. Rows "256" read images whose shorter side ``lockstep pack`` has resized to 256 pixels, as JPEG, and
"raw" their pixels. Everything runs on one core, and its processor time counts, of the worker and of the process that
receives the batches, from the first batch to the last; files are in the page cache. The rows take turns, and the best round of
each counts, as other programs on the machine only slow a round; the last column has the ratios of single rounds.

The tutorial's recipe returns normalized float32; the others return uint8, which the device normalizes. WebDataset and litdata
are not dependencies of lockstep: a row is left out, with a sentence, if its package is not installed.
"""

import argparse
import importlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchcodec.decoders import decode_image
from torchvision import datasets, transforms
from torchvision.transforms import v2

from lockstep.core import World
from lockstep.data import ImageFolder, Shards
from lockstep.data.loading import DataSharding
from lockstep.pack.command import main as pack

BATCH_SIZE = 64
SIZE = 224
PICTURES = 16
"""Different images; the files repeat them."""


def make_files(folder: Path, images: int) -> None:
    """Write ``images`` JPEGs of two classes, and pack them in three ways beside ``folder``."""
    pictures = [_jpeg(number) for number in range(min(images, PICTURES))]
    for number in range(images):
        path = folder / "train" / f"class-{number % 2}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[number % len(pictures)])
    for name, flags in (("shards", []), ("256", ["--shorter-side", "256"]), ("raw", ["--shorter-side", "256", "--raw"])):
        out = ["--shard-size", str(max(1, images // 4)), "--workers", "1", str(folder), str(folder.with_name(name))]
        if pack([*flags, *out]):
            raise RuntimeError("lockstep pack has failed")


def _jpeg(seed: int, height: int = 375, width: int = 500) -> bytes:
    """A JPEG of noise whose amplitude falls with the frequency, so that it needs as many bytes as photographs, also resized."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) + 1 / width
    waves = rng.standard_normal((4, height, width)) + 1j * rng.standard_normal((4, height, width))
    noise = np.fft.ifft2(waves * frequency**-1.6).real
    noise /= noise.std(axis=(1, 2), keepdims=True)
    pixels = (noise[:1] + 0.35 * noise[1:]) * 55 + 120
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=92)
    return file.getvalue()


def tutorial(root: Path) -> Iterator[Any]:
    """PIL, transforms v1, ToTensor and Normalize, as in PyTorch's ImageNet example."""
    recipe = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    return _batches(datasets.ImageFolder(root / "images" / "train", recipe), shuffle=True)


def torchvision_v2(root: Path) -> Iterator[Any]:
    """Decoded to a tensor, then transforms v2 on uint8."""
    return _batches(datasets.ImageFolder(root / "images" / "train", _augment, loader=_read), shuffle=True)


def _read(path: str) -> Any:
    return decode_image(path, mode="RGB")


def _augment(image: Any) -> Any:
    return v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])(image)


def _batches(dataset: Any, **options: Any) -> Iterator[Any]:
    return iter(DataLoader(dataset, BATCH_SIZE, num_workers=1, pin_memory=torch.cuda.is_available(), **options))


def webdataset(root: Path, shards: str = "shards") -> Iterator[Any]:
    """WebDataset reads the shards of lockstep in order, with a buffer of 1,000 samples for shuffling."""
    wds: Any = importlib.import_module("webdataset")
    names = sorted(map(str, (root / shards / "train").glob("*.tar")))
    samples = wds.WebDataset(names, shardshuffle=len(names), empty_check=False).shuffle(1000).to_tuple("jpg", "cls")
    batches = samples.map_tuple(_decode_and_augment, int).batched(BATCH_SIZE)
    return iter(wds.WebLoader(batches, batch_size=None, num_workers=1, pin_memory=torch.cuda.is_available()))


def _decode_and_augment(data: bytes) -> Any:
    return _augment(decode_image(data, mode="RGB"))


def litdata(root: Path) -> Iterator[Any]:
    """litdata's StreamingDataset of the same JPEGs, and its DataLoader."""
    lit: Any = importlib.import_module("litdata")

    class Images(lit.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return _decode_and_augment(bytes(sample["image"])), sample["label"]

    options = {"batch_size": BATCH_SIZE, "num_workers": 1, "pin_memory": torch.cuda.is_available()}
    return iter(lit.StreamingDataLoader(Images(str(root / "litdata"), shuffle=True), **options))


def _make_litdata(root: Path) -> None:
    lit: Any = importlib.import_module("litdata")
    files = sorted(map(str, (root / "images" / "train").rglob("*.jpg")))
    out = str(root / "litdata")
    lit.optimize(_litdata_sample, files, out, chunk_bytes="64MB", num_workers=1, start_method="fork", verbose=False)


def _litdata_sample(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "label": int(path.rpartition("/")[0][-1])}


def lockstep(root: Path, kind: type[ImageFolder] = ImageFolder, folder: str = "images") -> Iterator[Any]:
    """A DataModule of lockstep, as rank zero of one trains on it."""
    data = kind(root=root / folder, size=SIZE, batch_size=BATCH_SIZE, num_workers=1)
    data._datasets["train"] = data.load("train")
    loader = DataSharding(World(0, 1, 0, 1), seed=0).shard(data.train_dataloader(), is_training=True)
    return (data.on_before_batch_transfer(batch, 0) for batch in loader)


ROWS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "tutorial": tutorial,
    "torchvision v2": torchvision_v2,
    "WebDataset": webdataset,
    "WebDataset, 256": partial(webdataset, shards="256"),
    "litdata": litdata,
    "lockstep folders": lockstep,
    "lockstep shards": partial(lockstep, kind=Shards, folder="shards"),
    "lockstep shards, 256": partial(lockstep, kind=Shards, folder="256"),
    "lockstep shards, 256, raw": partial(lockstep, kind=Shards, folder="raw"),
}


def measure(row: Callable[[Path], Iterator[Any]], root: Path, result: Connection) -> None:
    """Send the images per second of processor time, of one epoch on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    batches = row(root)
    next(batches)
    images, start = 0, _processor_seconds()
    end = start
    for batch in batches:  # the worker may be gone when the iterator ends
        images, end = images + len(batch[0]), _processor_seconds()
    result.send(images / (end - start))


def _processor_seconds() -> float:
    """Processor time of this process and of its workers, in seconds."""
    # The clock of another process, as clock_getcpuclockid(3) of Linux makes its number.
    workers = [(~process.pid << 3) | 2 for process in multiprocessing.active_children() if process.pid is not None]
    return time.process_time() + sum(map(time.clock_gettime, workers))


def run_in_fork(work: Callable[..., None], *arguments: Any) -> Any:
    """What ``work`` sends in a process of its own, so that rows do not warm up each other."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*arguments, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{arguments[0]} has failed") from None
    finally:
        process.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12 * BATCH_SIZE, help="at least two batches")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()), help="where the images are made")
    options = parser.parse_args(arguments)
    rows = {name: ROWS[name] for name in ROWS if name in {"tutorial", *options.rows}}
    for package in ("webdataset", "litdata"):
        if find_spec(package) is None and (names := [name for name in rows if name.lower().startswith(package)]):
            print(f"{package} is not installed, and its rows are left out: uv pip install {package}")
            rows = {name: row for name, row in rows.items() if name not in names}
    root = Path(tempfile.mkdtemp(prefix="lockstep-input-", dir=options.root))
    try:
        make_files(root / "images", options.images)
        if "litdata" in rows:
            os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(root / "cache")
            _make_litdata(root)
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(options.rounds):
            for name, row in rows.items():
                rates[name].append(run_in_fork(measure, row, root))
    finally:
        shutil.rmtree(root)
    print("\n| rows | images/s | × tutorial | in single rounds |\n|---|---|---|---|")
    for name, found in rates.items():
        ratios = [rate / base for rate, base in zip(found, rates["tutorial"], strict=True)]
        best, base = max(found), max(rates["tutorial"])
        print(f"| {name} | {best:,.0f} | {best / base:.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
