"""Report at the end of a run: checksum of the weights, ``report.html``, and a summary."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lockstep.core import World, count, shell_command
from lockstep.runs import Run, RunResult, read_metrics
from lockstep.runs.report import write_report

log = logging.getLogger(__name__)


def weights_sha256(weights: Iterable[tuple[str, Any]], world: World) -> str:
    """SHA-256 of a state dict on rank zero; an empty string on other ranks.

    Hashes the tensors alone, one at a time, as all of them together may not fit into the memory of a rank. ``weights`` are
    sorted by name; every rank iterates over all of them.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        if not world.is_rank_zero or not isinstance(weight, Tensor):  # extra state of a module may be anything
            continue
        tensor = weight.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest() if world.is_rank_zero else ""


def draw(run: Run) -> None:
    """Draw ``report.png`` and ``report.html``; an error must not turn a finished run into a failed one."""
    try:
        write_report(run, run.folder)
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        log.warning("the report cannot be drawn (%s); try again with: %s", what, shell_command("report", run.folder))


def mean_speed(rows: Iterable[Mapping[str, str]]) -> tuple[float, float] | None:
    """Samples per second over all logged steps, and the part of the time spent waiting for data; None if never logged.

    All rows cover the same number of samples, so the mean is the harmonic one.
    """
    seconds = waited = logged = 0.0
    for row in rows:
        try:
            rate, wait = float(row["rate/samples_per_second"]), float(row["rate/data_wait"])
        except (KeyError, TypeError, ValueError):  # a row of a validation, or a damaged one
            continue
        if rate > 0:
            seconds, waited, logged = seconds + 1 / rate, waited + wait / rate, logged + 1
    return (logged / seconds, waited / seconds) if seconds else None


def summary_lines(run: Run, result: RunResult, wandb_location: str) -> list[str]:
    """Five lines about a finished run: outcome, metrics, throughput, weights, and where its files are.

    ``wandb_location`` is the URL of the W&B run, the command that uploads it, or ``off``.
    """
    metrics = result.metrics or {}
    stage = "test/" if any(name.startswith("test/") for name in metrics) else "val/"
    if result.predictions is not None:
        outcome = f"{count(result.samples, 'sample')} predicted: {result.predictions}"
    else:
        outcome = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith(stage))
        outcome += f" (the final test failed: {result.test_error})" if result.test_error else ""
    if (measured := mean_speed(read_metrics(run.metrics))) is not None:
        speed = f"{measured[0]:.0f} samples/s on average, {measured[1]:.0%} of the time waiting for data"
    elif result.command == "fit":
        speed = "throughput was not measured: fewer steps than trainer.log_every_n_steps"
    else:
        speed = "throughput was not measured: no training"
    seconds = result.seconds.training if result.seconds is not None else 0.0
    return [
        f"{run.name} {run.id} {result.status}: {count(result.global_step, 'step')}, {count(result.epochs, 'epoch')}, "
        f"{count(result.world_size, 'rank')}, {seconds:.1f} s",
        outcome or "no evaluation",
        speed,
        f"weights {f'sha256 {result.weights_sha256[:16]}…' if result.weights_sha256 else 'not saved'}  W&B: {wandb_location}",
        f"run folder {run.folder}",
    ]
