"""The picture of a run: one panel per quantity, legends above the panels, restarts as dashed lines."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lockstep.runs.report.panels import Chart, Panel
from lockstep.runs.report.predictions import Predicted

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:green"}
_INCH_PER_ROW, _WIDTH, _HEAD = 3.0, 11.0, 0.75
_LEGEND_COLUMNS, _MAX_LEGEND = 3, 6
_MAX_TENSORS = 6
_MAX_CLASSES = 50
_MAX_BARS = 1000


def draw_picture(title: str, chart: Chart, restarts: Sequence[int], predictions: Sequence[Predicted]) -> bytes:
    """A PNG of what ``make_figure`` returns."""
    target = io.BytesIO()
    make_figure(title, chart, restarts, predictions).savefig(target, format="png", dpi=110)
    return target.getvalue()


def make_figure(title: str, chart: Chart, restarts: Sequence[int], predictions: Sequence[Predicted]) -> "Figure":
    """The picture of a run.

    Args:
        title: First line: which run, and how far.
        restarts: Steps at which the run was resumed.
        predictions: What ``predict`` has written; empty for another command.
    """
    # matplotlib takes half a second to import, and most commands do not draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plots = _prediction_plots(predictions)
    count = len(chart.panels) + len(plots)
    columns = 1 if count <= 1 else 2 if count <= 4 else 3
    rows = max(1, math.ceil(count / columns)) if count else 0
    text = _lines(chart, restarts, bool(count))
    head = _HEAD + 0.2 * len(text)
    height = head + 0.1 + _INCH_PER_ROW * rows
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    _write_head(figure, height, title, text)
    if count:
        # A layout that fits itself would draw twice.
        figure.subplots_adjust(0.07, 0.5 / height, 0.98, 1 - (head + 0.4) / height, 0.2, 0.5)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        end = max((step for panel in chart.panels for curve in panel.curves for step in curve.steps), default=0)
        for panel, place in zip(chart.panels, axes, strict=False):
            _draw_panel(place, panel, end, restarts)
        for plot, place in zip(plots, axes[len(chart.panels) :], strict=False):
            _draw_predictions(place, *plot)
        for place in axes[count:]:
            place.remove()
        if chart.panels:
            figure.supxlabel("step", y=0.08 / height, fontsize=9)
    return figure


def _lines(chart: Chart, restarts: Sequence[int], has_panels: bool) -> list[str]:
    """The lines below the title."""
    lines = []
    scores = [f"{name} {value:.4g}" for name, value in chart.scores.items()]
    per_line = 6 if has_panels else 1
    lines += ["   ".join(scores[at : at + per_line]) for at in range(0, len(scores), per_line)]
    if restarts and has_panels:
        steps = ", ".join(map(str, restarts[:8])) + (", …" if len(restarts) > 8 else "")
        lines.append(f"dashed: resumed from step {steps}")
    if not has_panels and not scores:
        lines.append("No metric has been logged.")
    return [*lines, *(f"not drawn: {note}" for note in chart.notes)]


def _write_head(figure: "Figure", height: float, title: str, lines: Sequence[str]) -> None:
    figure.text(0.07, 1 - 0.35 / height, title, fontsize=12, fontweight="bold", parse_math=False)
    for number, line in enumerate(lines):
        short = line if len(line) <= 150 else f"{line[:149]}…"
        figure.text(0.07, 1 - (0.62 + 0.2 * number) / height, short, fontsize=9, color="0.3", parse_math=False)


def _draw_panel(axes: "Axes", panel: Panel, end: int, restarts: Sequence[int]) -> None:
    """Draw the curves of a panel over the steps up to ``end``."""
    for series in panel.curves:
        stage = series.label.partition(" ")[0]
        is_long = len(series.values) > 200
        axes.plot(
            series.steps,
            series.values,
            marker="." if len(series.values) < 30 else "",
            linewidth=0.8 if is_long else 1.4,
            linestyle=":" if series.label.endswith("step") else "-",
            color=_COLOURS.get(stage),
            label=series.label,
        )
    for test in panel.scores:
        label = f"{test.label} {test.values[-1]:.4g}"
        axes.plot(test.steps[-1:], test.values[-1:], "*", markersize=10, color=_COLOURS["test"], label=label, linestyle="")
    for step in restarts:
        if step <= end:
            axes.axvline(step, color="0.5", linestyle="--", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.02 * end, 1.02 * end)
    if panel.is_log:
        axes.set_yscale("log")
    axes.locator_params("x", integer=True, nbins=6)
    handles, labels = axes.get_legend_handles_labels()
    shown = _MAX_LEGEND if labels not in ([panel.title], [panel.curves[0].name]) else 0
    handles, labels = handles[:shown], [label if len(label) <= 24 else f"{label[:23]}…" for label in labels[:shown]]
    if handles:  # above the panel, where no curve is
        look = {"frameon": False, "fontsize": 8, "handlelength": 1.2, "columnspacing": 1.2, "borderpad": 0.2}
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=_LEGEND_COLUMNS, **look)
    _finish(axes, panel.title, legend_rows=math.ceil(len(handles) / _LEGEND_COLUMNS))


def _finish(axes: "Axes", title: str, legend_rows: int = 0) -> None:
    short = title if len(title) <= 44 else f"{title[:43]}…"
    axes.set_title(short, loc="left", fontsize=10, pad=5 + 13 * legend_rows, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _prediction_plots(predictions: Sequence[Predicted]) -> list[tuple[Predicted, str]]:
    """The tensors to draw, and how."""
    plots = []
    for tensor in predictions[:_MAX_TENSORS]:
        if tensor.values is None or not tensor.values.size:
            continue
        if tensor.are_probabilities:
            plots += [(tensor, "class"), (tensor, "probability")]
        else:
            plots.append((tensor, "values"))
    return plots


def _draw_predictions(axes: "Axes", tensor: Predicted, how: str) -> None:
    import numpy

    values = tensor.values
    assert values is not None
    if how == "class":
        _draw_counts(axes, values.argmax(1), tensor.shape[1])
        _finish(axes, f"{tensor.name}: samples per predicted class")
    elif how == "probability":
        axes.hist(values.max(1), bins=20, range=(1 / tensor.shape[1], 1))
        _finish(axes, f"{tensor.name}: highest probability")
    elif not tensor.is_float and len(numpy.unique(values[:10_000])) <= _MAX_CLASSES and values.min() >= 0:
        _draw_counts(axes, values.reshape(-1), int(values.max()) + 1)
        _finish(axes, f"{tensor.name}: number of each value")
    else:
        flat = values.reshape(-1)
        finite = flat[numpy.isfinite(flat)] if tensor.is_float else flat
        axes.hist(finite, bins=min(50, 2 + int(len(finite) ** 0.5)))
        _finish(axes, f"{tensor.name}: values")


def _draw_counts(axes: "Axes", classes: "numpy.ndarray[Any, Any]", count: int) -> None:
    """Draw one bar for each class; a histogram where they are too many for bars, such as the words of a vocabulary."""
    import numpy

    if count > _MAX_BARS:
        axes.hist(classes, bins=50, range=(0, count))
    else:
        axes.bar(range(count), numpy.bincount(classes.astype("i8"), minlength=count))
    axes.locator_params("x", integer=True)
