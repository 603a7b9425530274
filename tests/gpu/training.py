"""Rows about training: precisions, memory formats, compilation, resuming, several ranks on one GPU, ZeRO, hangs."""

import json
import os
import pickle
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from support.faults import fault

from gpu.harness import Line, Place
from gpu.runs import DIGITS, EXACT, FLAT, difference, in_fork, inspected, killed_and_resumed, launch

SHARE = ("--ranks", "2", "--distributed.backend", "gloo")
"""Two ranks; on a GPU they share it."""


def precisions(place: Place) -> Iterator[Line]:
    """Each precision, with fused AdamW and channels-last filters."""
    for precision, dtype, fused in (
        ("32-true", "float32", True),
        ("bf16-mixed", "float32", True),
        ("bf16-true", "bfloat16", True),
        *([] if place.is_rehearsal else [("16-mixed", "float32", False)]),
    ):
        run, found = inspected(place, precision, *DIGITS, "--trainer.precision", precision, "--model.channels_last", "true")
        losses = run.series("train/loss") if run.status == 0 else []
        is_right = (
            len(losses) == 20
            and losses[-1] < 0.7 * losses[0]
            and (found["dtype"], found["fused"], found["channels_last"]) == (dtype, fused, True)
            and found["step"] == (place.device if fused else "cpu")
            and found["pinned"] == (not place.is_rehearsal)
        )
        text = f"loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else f"exit status {run.status}"
        yield Line(f"train in {precision}, channels-last", f"{text}; {json.dumps(found)}", is_right)
    run, _ = inspected(place, "auto", *DIGITS)
    chosen = (run.folder / "config.yaml").read_text() if run.status == 0 else ""
    expected = "32-true" if place.is_rehearsal else "bf16-mixed"
    yield Line("precision auto", f"is {expected}", f"precision: {expected}" in chosen)


def compiled(place: Place) -> Iterator[Line]:
    """``model.compile``, and a restart of a compiled run."""
    arguments = (*DIGITS, "--model.compile", "true", "--trainer.precision", "bf16-mixed")
    yield killed_and_resumed(place, "torch.compile in bf16-mixed", *arguments, exact=False)


def resuming(place: Place) -> Iterator[Line]:
    """Bit-equal resume with deterministic kernels; what is not exact is measured."""
    yield killed_and_resumed(place, "resume, deterministic, 32-true", *DIGITS, *EXACT)
    mixed = ("--trainer.deterministic", "true", "--trainer.precision", "bf16-mixed", "--model.channels_last", "true")
    yield killed_and_resumed(place, "resume, deterministic, bf16-mixed, channels-last", *DIGITS, *mixed)
    yield killed_and_resumed(place, "resume, default kernels", *DIGITS, exact=False)
    if not place.is_rehearsal:
        network = ("--model.network", "resnet18", "--data", "lockstep.data.Synthetic", "--data.shape", "[3,64,64]")
        size = ("--data.classes", "10", "--data.train_samples", "1280", "--data.val_samples", "64")
        resnet = (*DIGITS[2:], "--model", "lockstep.models.Classifier", *network, *size)
        yield killed_and_resumed(place, "resume, deterministic, ResNet-18, bf16-mixed", *resnet, *mixed)


def feeding(place: Place) -> Iterator[Line]:
    """Batches of workers, from pinned memory and, where lockstep does that, on a side stream: the same weights."""
    arguments = (*DIGITS, *EXACT)
    plain = launch(place, *arguments)
    fed, found = inspected(place, "fed", *arguments, "--data.num_workers", "2")
    if plain.status or fed.status:
        yield Line("batches from workers", f"exit statuses {plain.status} and {fed.status}", False)
        return
    same = difference(fed, plain)
    text = f"{found['fetcher']}, {'pinned' if found['pinned'] else 'not pinned'}; weights of a run without workers: {same}"
    yield Line("batches from workers", text, same == "equal bit for bit")


def sharing(place: Place) -> Iterator[Line]:
    """Two ranks over gloo that share the GPU: the losses of one rank, and a kill of rank 1."""
    yield killed_and_resumed(place, "two ranks share the GPU over gloo", *DIGITS, *FLAT, *EXACT, *SHARE, rank=1)
    one = launch(place, *DIGITS, *FLAT, *EXACT)
    two = launch(place, *DIGITS, *FLAT, *EXACT, *SHARE)
    if one.status or two.status:
        yield Line("losses of one and two ranks", f"exit statuses {one.status} and {two.status}", False)
        return
    pairs = zip(one.series("train/loss"), two.series("train/loss"), strict=True)
    largest = max(abs(first - second) for first, second in pairs)
    yield Line("losses of one and two ranks", f"differ by up to {largest:.2g}", largest < 1e-3)


def hang(place: Place) -> Iterator[Line]:
    """One of two ranks is stopped: the watchdog names it, and the flight recorder's files are there."""
    arguments = (*DIGITS, *FLAT, *SHARE, "--run.hang_timeout_seconds", "3")
    run = launch(place, *arguments, *fault(place.folder / "stopped", "SIGSTOP", step=5, rank=1))
    said = json.loads((run.folder / "logs/1/failure.json").read_text()) if run.status else {}
    traces = sorted(path.name for path in run.folder.glob("logs/1/nccl-trace-*"))
    is_right = said.get("rank") == 1 and traces == ["nccl-trace-0"]
    yield Line("watchdog, a rank that is stopped", f"rank {said.get('rank')} is named; traces: {traces}", is_right)


def process_group(place: Place) -> Iterator[Line]:
    """The process group as a run starts it, with one rank: NCCL bound to its device, and a gloo group beside it."""
    found = in_fork(lambda: _exercise_process_group(place), 90)
    yield Line(f"{'gloo' if place.is_rehearsal else 'NCCL'} with one rank, and gloo beside it", *found)


def _exercise_process_group(place: Place) -> tuple[str, bool]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from lockstep.compat.torch import flight_record, replay_backward
    from lockstep.core import World
    from lockstep.distributed import destroy_process_group, init_process_group, local_devices
    from lockstep.models.networks import MLP

    (device,) = local_devices(World(), place.accelerator, "auto", os.environ)
    init_process_group(World(), device, timedelta(minutes=1), alone=True)
    group: Any = torch.distributed.new_group(backend="gloo")
    counts = torch.tensor([1, 2])
    torch.distributed.all_reduce(counts, group=group)
    received: list[Any] = [None]
    torch.distributed.all_gather_object(received, {"rank": 0}, group=group, weights_only=True)
    torch.distributed.broadcast_object_list(received, src=0, weights_only=True)
    torch.distributed.barrier(device_ids=None if place.is_rehearsal else [0])
    network = MLP((1, 8, 8), 10, [16]).to(device)
    model = DistributedDataParallel(network, device_ids=None if place.is_rehearsal else [0], gradient_as_bucket_view=True)
    replay_backward(model, list(network.parameters()))
    model(torch.randn(4, 1, 8, 8, device=device)).sum().backward()
    gradient = sum(float(p.grad.abs().sum()) for p in network.parameters() if p.grad is not None)
    record = pickle.loads(flight_record())
    names = sorted({entry["profiling_name"] for entry in record["entries"]})
    destroy_process_group()
    is_right = received == [{"rank": 0}] and gradient > 0 and any("all_reduce" in name for name in names)
    return f"collectives {', '.join(names)}", is_right


def timed_out(place: Place) -> Iterator[Line]:
    """A collective behind a kernel that takes a minute: NCCL's watchdog writes the flight recorder's file and ends the rank."""
    name = "NCCL time-out"
    if place.is_rehearsal:
        yield Line(name, "needs a GPU")
        return
    from multiprocessing import get_context

    process = get_context("fork").Process(target=_wait_behind_a_kernel, args=(place,))
    process.start()
    began, file = time.monotonic(), place.folder / "nccl-trace-0"
    while time.monotonic() - began < 50 and not (file.exists() and file.stat().st_size) and process.is_alive():
        time.sleep(0.5)
    process.join(5)
    took, status = time.monotonic() - began, process.exitcode
    process.kill()
    process.join()
    if not file.exists():
        yield Line(name, f"no trace after {took:.0f} s; exit status {status}", False)
        return
    entries = pickle.loads(file.read_bytes())["entries"]
    yield Line(name, f"trace with {len(entries)} collectives after {took:.0f} s; exit status {status}", bool(entries))


def _wait_behind_a_kernel(place: Place) -> None:
    import torch

    from lockstep.core import World
    from lockstep.distributed import init_process_group, local_devices
    from lockstep.distributed.process_group import enable_flight_recorder

    enable_flight_recorder(place.folder, os.environ)
    (device,) = local_devices(World(), "gpu", "auto", os.environ)
    init_process_group(World(), device, timedelta(seconds=8), alone=True)
    tensor = torch.ones(8, device=device)
    torch.distributed.all_reduce(tensor)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(1e11))  # type: ignore[no-untyped-call]
    torch.distributed.all_reduce(tensor)
    time.sleep(60)


ZERO = {
    "ZeRO 1": ["--deepspeed.stage", "1"],
    "ZeRO 2": ["--deepspeed.stage", "2"],
    "ZeRO 3": ["--deepspeed.stage", "3"],
    "ZeRO 2, optimizer in CPU memory": ["--deepspeed.stage", "2", "--deepspeed.offload_optimizer", "cpu"],
    "ZeRO 3, all in CPU memory": [
        *("--deepspeed.stage", "3", "--deepspeed.offload_optimizer", "cpu", "--deepspeed.offload_param", "cpu")
    ],
}


def zero(place: Place) -> Iterator[Line]:
    """ZeRO 1 to 3 and offload, over NCCL with one rank: the losses of a plain run, and for stage 3 a kill."""
    base = (*DIGITS, *FLAT, "--trainer.precision", "32-true")
    plain = launch(place, *base)
    for name, options in ZERO.items():
        run, found = inspected(place, name.replace(" ", "-"), *base, "--strategy", "deepspeed", *options)
        if run.status or plain.status:
            yield Line(name, f"exit statuses: {run.status}, of the plain run {plain.status}", False)
            continue
        pairs = zip(run.series("train/loss"), plain.series("train/loss"), strict=True)
        largest = max(abs(first - second) for first, second in pairs)
        text = f"losses differ from a plain run by up to {largest:.2g}; {difference(run, plain)}; peak {found['peak']:,} B"
        yield Line(name, text, largest < 1e-3)
    yield killed_and_resumed(place, "resume, ZeRO 3", *base, "--strategy", "deepspeed", *ZERO["ZeRO 3"], *EXACT[:2])
    mixed = ("--trainer.precision", "bf16-mixed", "--strategy", "deepspeed")
    yield killed_and_resumed(place, "resume, ZeRO 2, bf16-mixed", *DIGITS, *FLAT, *mixed, *ZERO["ZeRO 2"], exact=False)
