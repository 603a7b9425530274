"""The report at the end of a run: checksum of the weights, plots of the metrics, and a summary."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lockstep.core import World
from lockstep.monitoring.csv_logger import METRICS_ROW, read_metrics
from lockstep.runs import Run, RunResult


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
    """Draw loss, accuracy, learning rate and throughput over the steps into ``report.png``."""
    # matplotlib takes a second to import, and only a finished run needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_metrics(run.metrics):
        for name, value in row.items():
            if value and name not in (METRICS_ROW, "step", "epoch"):
                steps, values = series.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    # A layout that fits itself would draw twice, and most of the time goes into ticks: all plots share those of the steps.
    figure = Figure(figsize=(11, 7))
    FigureCanvasAgg(figure)
    figure.suptitle(f"{run.name} {run.id}")
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.07, top=0.93, wspace=0.17, hspace=0.08)
    labels = {"loss": "loss", "accuracy": "accuracy", "optim/lr": "learning rate", "rate/samples_per_second": "samples/s"}
    for axes, (metric, label) in zip(figure.subplots(2, 2, sharex=True).flat, labels.items(), strict=True):
        for name, (steps, values) in sorted(series.items()):
            if metric in name and not name.startswith("test"):
                axes.plot(steps, values, marker="." if len(values) < 30 else "", label=name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.locator_params("x", integer=True)
        axes.set_visible(bool(axes.lines))
        if axes.lines:
            axes.legend()
    figure.supxlabel("step")
    figure.savefig(run.folder / "report.png", dpi=110)


def summary_lines(run: Run, result: RunResult, wandb_location: str) -> list[str]:
    """Five lines about a finished run: outcome, metrics, throughput, weights, and where its files are.

    ``wandb_location`` is the URL of the W&B run, the command that uploads it, or ``off``.
    """
    metrics = result.metrics or {}
    stage = "test/" if any(name.startswith("test/") for name in metrics) else "val/"
    if result.predictions is not None:
        outcome = f"{result.samples} samples predicted: {result.predictions}"
    else:
        outcome = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith(stage))
        outcome += f" (the final test failed: {result.test_error})" if result.test_error else ""
    if "rate/samples_per_second" in metrics and "rate/data_wait" in metrics:
        waiting = f"{metrics['rate/data_wait']:.0%} of the time waiting for data"
        speed = f"{metrics['rate/samples_per_second']:.0f} samples/s, {waiting}"
    elif result.command == "fit":
        speed = "throughput was not measured: fewer steps than trainer.log_every_n_steps"
    else:
        speed = "throughput was not measured: no training"
    seconds = result.seconds.training if result.seconds is not None else 0.0
    return [
        f"{run.name} {run.id} {result.status}: {result.global_step} steps, {result.epochs} epochs, "
        f"{result.world_size} ranks, {seconds:.1f} s",
        outcome or "no evaluation",
        speed,
        f"weights {f'sha256 {result.weights_sha256[:16]}…' if result.weights_sha256 else 'not saved'}  W&B: {wandb_location}",
        f"run folder {run.folder}",
    ]
