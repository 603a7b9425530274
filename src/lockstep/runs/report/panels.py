"""Group the columns of ``metrics.csv`` into panels, one for each quantity."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from lockstep.core import count
from lockstep.runs import METRICS_ROW

_STAGES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_STAGE_FIRST = re.compile(rf"({'|'.join(_STAGES)})[/_.-](.+)")
_STAGE_LAST = re.compile(rf"(.+)[/_.-]({'|'.join(_STAGES)})")
_SUFFIX = re.compile(r"(.+?)(?:_(step|epoch)|/(dataloader_idx_\d+))$")

_SYSTEM = {
    "optim/lr": "learning rate",
    "optim/grad_norm": "gradient norm",
    "rate/samples_per_second": "samples/s",
    "rate/data_wait": "share of time waiting for data",
    "rate/step_ms": "",  # another form of the samples per second
}
"""Titles of the metrics that lockstep logs in every run; their panels come last. Empty: not drawn."""

MAX_PANELS = 12
"""More do not fit on a page."""

_LOG_RANGE, _LOG_SHARE = 20.0, 0.2
"""A logarithmic axis helps if values span this factor, and half of them lie in this lowest share of a linear axis."""


@dataclass(frozen=True)
class Series:
    """The values of one column.

    Attributes:
        name: Of the column.
        label: In its panel.
        steps: Optimizer steps done, one for each value.
        values: May be NaN, but not infinite; at least one is a number.
    """

    name: str
    label: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Panel:
    """A quantity, with one curve for each stage that logs it.

    Attributes:
        scores: The results of the final test.
        is_log: Whether a logarithmic axis helps.
    """

    title: str
    curves: list[Series]
    scores: list[Series]
    is_log: bool


@dataclass(frozen=True)
class Chart:
    """All panels of a run.

    Attributes:
        scores: Newest value of each metric that is not a curve, by name: those of the final test, or of an evaluation.
        notes: What is not drawn, and why.
    """

    panels: list[Panel]
    scores: dict[str, float]
    notes: list[str]


def make_chart(rows: Iterable[Mapping[str, str]]) -> Chart:
    """Sort the columns of ``metrics.csv`` into panels; columns without a number are named in the notes."""
    columns, unreadable = _columns(rows)
    notes = [f"{name} has no finite value" for name, series in columns.items() if not _finite(series.values)]
    if unreadable:
        notes.append(f"not a number in metrics.csv: {count(unreadable, 'value')}")
    drawn = {name: series for name, series in columns.items() if _finite(series.values)}
    steps = {step for series in drawn.values() for step in series.steps}
    if len(steps) <= 1:  # an evaluation: points are no curves
        return Chart([], {name: series.values[-1] for name, series in drawn.items() if name not in _SYSTEM}, notes)
    groups: dict[str, list[Series]] = {}
    for name, series in drawn.items():
        if title := _SYSTEM.get(name, _parts(name)[1]):
            groups.setdefault(title, []).append(series)
    panels: list[Panel] = []
    scores: dict[str, float] = {}
    for title, group in groups.items():
        curves = [series for series in group if not _is_test(series.name)]
        tests = [series for series in group if _is_test(series.name)]
        scores |= {series.name: series.values[-1] for series in tests}
        if curves:
            panels.append(Panel(title, curves, tests, _needs_log(curves, tests)))
    panels.sort(key=_rank)
    if more := panels[MAX_PANELS:]:
        notes.append(f"{len(more)} more are in metrics.csv: {', '.join(panel.title for panel in more[:8])}")
    return Chart(panels[:MAX_PANELS], scores, notes)


def _columns(rows: Iterable[Mapping[str, str]]) -> tuple[dict[str, Series], int]:
    """The columns with any value, by name, and the number of values that are not numbers."""
    found: dict[str, Series] = {}
    unreadable = 0
    for row in rows:
        for name, text in row.items():
            if not text or name in (METRICS_ROW, "step", "epoch"):
                continue
            try:
                step, value = int(row["step"]), float(text)
            except (KeyError, TypeError, ValueError):
                unreadable += 1
                continue
            series = found.setdefault(name, Series(name, _label(name), [], []))
            series.steps.append(step)
            series.values.append(value if math.isfinite(value) else math.nan)
    return found, unreadable


def _parts(name: str) -> tuple[str, str, str]:
    """Stage, quantity and suffix of a metric: ``val_loss_epoch`` is val, loss and epoch; stage and suffix may be empty."""
    suffix = ""
    if found := _SUFFIX.fullmatch(name):
        name, suffix = found[1], found[2] or found[3].replace("dataloader_idx_", "loader ")
    if found := _STAGE_FIRST.fullmatch(name):
        return _STAGES[found[1]], found[2], suffix
    if found := _STAGE_LAST.fullmatch(name):
        return _STAGES[found[2]], found[1], suffix
    return "", name, suffix


def _label(name: str) -> str:
    stage, _, suffix = _parts(name)
    return " ".join(filter(None, (stage, suffix))) or name


def _is_test(name: str) -> bool:
    return _parts(name)[0] == "test"


def _rank(panel: Panel) -> tuple[int, int]:
    """Sort key: losses first, then other metrics of the module in its order, then those of ``_SYSTEM``."""
    titles = list(_SYSTEM.values())
    if panel.title in titles:
        return 2, titles.index(panel.title)
    return (0 if "loss" in panel.title.lower() else 1), 0


def _needs_log(curves: Sequence[Series], tests: Sequence[Series]) -> bool:
    """Whether a linear axis would squeeze any curve into its lowest part, and all values are positive."""
    values = [_finite(series.values) for series in curves]
    if min(map(min, [*values, *([test.values[-1]] for test in tests if _finite(test.values))])) <= 0:
        return False
    return any(max(v) >= _LOG_RANGE * min(v) and median(v) <= _LOG_SHARE * max(v) for v in values)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
