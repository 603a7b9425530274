"""The end of a run: ``result.json``, the picture of its curves, and the five lines that a person wants to read."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lockstep.core import World
from lockstep.monitoring.csv_logger import read_metrics
from lockstep.runs import Run


def weights_sha256(weights: Iterable[tuple[str, Tensor]], world: World) -> str:
    """SHA-256 of a state dict: of each name, type, shape and bytes, in the order of the names; empty where not on rank zero.

    One tensor at a time: all of them together may not fit into the memory of a rank.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        if not world.is_rank_zero:
            continue
        tensor = weight.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest() if world.is_rank_zero else ""


def metric_series(run: Run) -> Mapping[str, tuple[list[int], list[float]]]:
    """Steps and values of each metric in ``metrics.csv``."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_metrics(run.metrics) if run.metrics.exists() else []:
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                steps, values = series.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    return series


def draw_report(run: Run) -> None:
    """``report.png``: loss, accuracy, learning rate and speed over the steps."""
    # matplotlib takes a second to import; only a run that ends well needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = metric_series(run)
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{run.name} {run.id}")
    panels = (
        ("loss", "loss"),
        ("accuracy", "accuracy"),
        ("optim/lr", "learning rate"),
        ("rate/samples_per_second", "samples/s"),
    )
    for axes, (part, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for name, (steps, values) in sorted(series.items()):
            if part in name and not name.startswith("test"):
                axes.plot(steps, values, marker="." if len(values) < 30 else "", label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(run.folder / "report.png", dpi=110)


def summary_lines(run: Run, result: Mapping[str, Any], tracked: str) -> list[str]:
    """What happened, how well, how fast, which weights, and where everything is."""
    metrics: Mapping[str, float] = result["metrics"]
    stage = "test" if any(name.startswith("test/") for name in metrics) else "val"
    predicted = f"{result['samples']} samples predicted: {result['predictions']}" if "predictions" in result else ""
    scores = predicted or ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith(f"{stage}/"))
    speed = metrics.get("rate/samples_per_second")
    waiting = metrics.get("rate/data_wait")
    unmeasured = "fewer steps than trainer.log_every_n_steps" if result["command"] == "fit" else "nothing was trained"
    return [
        f"{run.name} {run.id} {result['status']}: {result['global_step']} steps, {result['epochs']} epochs, "
        f"{result['world_size']} ranks, {result['seconds']['training']:.1f} s",
        scores or "nothing was evaluated",
        f"{speed:.0f} samples/s, {waiting:.0%} of the time waiting for data"
        if speed is not None and waiting is not None
        else f"speed was not measured: {unmeasured}",
        f"weights sha256 {result['weights_sha256'][:16]}…  W&B: {tracked}",
        f"run folder {run.folder}",
    ]
