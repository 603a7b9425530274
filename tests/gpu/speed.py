"""Rows about memory and speed: the plan, the step against hand-written loops, images from files and from shards."""

import inspect
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from support.runs import REPO

from gpu.harness import Line, Place
from gpu.runs import in_fork, inspected, launch

IMAGENET = (
    *("--config", str(REPO / "configs/synthetic.yaml"), "--model.schedule", "constant", "--trainer.max_epochs", "1"),
    *("--trainer.limit_val_batches", "0", "--trainer.enable_checkpointing", "false", "--run.test_after_fit", "false"),
    *("--wandb.mode", "disabled", "--data.batch_size_per_rank", "null"),
)
"""Random images of ImageNet's size and number of classes."""


def plan(place: Place) -> Iterator[Line]:
    """What ``lockstep plan`` says against ``torch.cuda.max_memory_allocated`` in the first steps."""
    cases: Sequence[tuple[str, str, int, str]] = (
        ("ResNet-50", "resnet50", 64, "bf16-mixed"),
        ("ResNet-50", "resnet50", 64, "32-true"),
        ("ViT-B/16", "vit_b_16", 64, "bf16-mixed"),
    )
    if place.is_rehearsal:
        cases = (("ShuffleNet", "shufflenet_v2_x0_5", 2, "32-true"),)
    for title, network, batch, precision in cases:
        size = ("--data.batch_size", str(batch), "--data.train_samples", str(5 * batch))
        adamw = ("--model.optimizer", "adamw", "--model.lr", "0.001")
        keys = [*IMAGENET, "--model.network", network, *adamw, *size, "--trainer.precision", precision]
        expected = in_fork(partial(_estimate, keys, batch, precision), 90)
        run, found = inspected(place, f"{network}-{precision}", *keys)
        what = f"plan, {title}, batch {batch}, {precision}"
        if run.status or not found:
            yield Line(what, f"exit status {run.status}", False)
        elif place.is_rehearsal:
            yield Line(what, f"planned {expected / 2**30:.2f} GiB")
        else:
            ratio = found["peak"] / expected
            text = f"planned {expected / 2**30:.2f} GiB, measured {found['peak'] / 2**30:.2f} GiB: ratio {ratio:.2f}"
            yield Line(what, text, 0.6 < ratio < 1.1)


def _estimate(keys: list[str], batch: int, precision: str) -> int:
    from lockstep.planning.memory import TrainingOptions, estimate_memory
    from lockstep.planning.model_profile import profile_model
    from lockstep.trainer.config_parser import parse_config

    model = profile_model(parse_config(keys)[1], precision)
    return estimate_memory("ddp", model, 1, batch, TrainingOptions(precision)).total


def steps(place: Place) -> Iterator[Line]:
    """ResNet-50 and ViT-B/16 in bf16-mixed against a hand-written loop; images on the device."""
    yield from _compare(place, [("ResNet-50", 256, True, False), ("ViT-B/16", 256, False, False)], rounds=2)


def compiled_steps(place: Place) -> Iterator[Line]:
    """The same, compiled."""
    yield from _compare(place, [("ResNet-50", 256, True, True), ("ViT-B/16", 256, False, True)], rounds=1)


def _compare(place: Place, cases: Sequence[tuple[str, int, bool, bool]], rounds: int) -> Iterator[Line]:
    import step
    from step_setup import Setup

    if place.is_rehearsal:
        cases, step.WARM_UP, rounds = (
            [("small conv net", 8, channels, compiled) for _, _, channels, compiled in cases[:1]],
            1,
            1,
        )
    count = step.WARM_UP + (2 if place.is_rehearsal else 40)
    for network, batch, channels_last, is_compiled in cases:
        setup = Setup(network, batch, "bf16-mixed", channels_last, is_compiled, place.accelerator)
        seconds: dict[str, list[float]] = {"hand-written DDP": [], "lockstep": []}
        for _ in range(rounds):
            for trainer, measured in seconds.items():
                measured.append(step.measure(trainer, setup, 1, count))
        by_hand, ours = (statistics.median(measured) for measured in seconds.values())
        how = f"{', channels-last' if channels_last else ''}{', compiled' if is_compiled else ''}"
        text = f"{batch / ours:,.0f} images/s, hand-written loop {batch / by_hand:,.0f}; time of a step × {ours / by_hand:.3f}"
        print(setup, seconds, flush=True)
        is_fast = None if place.is_rehearsal else ours / by_hand < 1.05
        yield Line(f"{network}, batch {batch}, bf16-mixed{how}", text, is_fast)


def images(place: Place) -> Iterator[Line]:
    """Input from files and from shards, decoded on CPUs, and by the GPU where lockstep has that."""
    from lockstep.data import ImageFolder

    folder = place.folder / "images"
    count, size = (64, (60, 80)) if place.is_rehearsal else (4096, (375, 500))
    in_fork(lambda: _write_images(folder, count, size), 120)
    batch = 8 if place.is_rehearsal else 256
    base = (
        *(*IMAGENET, "--model.network", "shufflenet_v2_x0_5" if place.is_rehearsal else "resnet18"),
        *("--data.batch_size", str(batch), "--trainer.max_epochs", "1" if place.is_rehearsal else "4"),
        *("--trainer.precision", "bf16-mixed", "--model.channels_last", "true", "--trainer.log_every_n_steps", "4"),
    )
    workers = ("--data.num_workers", "2" if place.is_rehearsal else "14")
    files = ("--data", "lockstep.data.ImageFolder", "--data.root", str(folder))
    yield _throughput(place, "images from files, decoded on CPUs", *base, *files, *workers)
    if "decode" not in inspect.signature(ImageFolder.__init__).parameters:
        yield Line("images from files, decoded by the GPU", "lockstep has no data.decode")
    elif not place.is_rehearsal:
        gpu = ("--data.decode", "gpu")
        yield _throughput(place, "images from files, decoded by the GPU", *base, *files, *workers, *gpu)
    packed = place.folder / "packed"
    status = in_fork(lambda: _pack(folder, packed), 120)
    if status:
        yield Line("images from shards", f"lockstep pack ended with exit status {status}", False)
        return
    shards = ("--data", "lockstep.data.Shards", "--data.root", str(packed))
    yield _throughput(place, "images from shards", *base, *shards, *workers)


def _write_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write JPEGs of two classes: smooth random images, one file of each size linked many times."""
    import torch
    from torchvision.io import write_jpeg

    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
    small = torch.rand(32, 3, 12, 16)
    pixels = (torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    for number, image in enumerate(pixels):
        write_jpeg(image, str(folder / f"{number}.jpg"), quality=90)
    for number in range(count):
        split, label = "val" if number % 16 < 2 else "train", "ab"[number % 2]
        (folder / split / label / f"{number}.jpg").write_bytes((folder / f"{number % 32}.jpg").read_bytes())
    for number in range(32):
        (folder / f"{number}.jpg").unlink()


def _pack(source: Path, out: Path) -> int:
    from lockstep import cli

    return cli.main(["pack", str(source), str(out)])


def _throughput(place: Place, what: str, *arguments: str) -> Line:
    began = time.monotonic()
    run = launch(place, *arguments)
    if run.status:
        return Line(what, f"exit status {run.status}", False)
    rates, waits = run.series("rate/samples_per_second"), run.series("rate/data_wait")
    if not rates:
        return Line(what, f"finished in {time.monotonic() - began:.0f} s", None if place.is_rehearsal else False)
    half = len(rates) // 2
    rate, wait = statistics.median(rates[half:]), statistics.median(waits[half:])
    return Line(what, f"{rate:,.0f} images/s with ResNet-18, {wait:.0%} of the time waiting for data", True)
