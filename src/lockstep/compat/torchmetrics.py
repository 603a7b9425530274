"""Private names of torchmetrics: the state that a metric accumulates on this rank."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, SumMetric
from torchmetrics.wrappers import MinMaxMetric, Running

from lockstep.compat import private

for _name in ("_update_count", "_forward_cache", "_defaults", "_reductions", "_computed"):
    private("torchmetrics", SumMetric(), _name)
private("torchmetrics", SumMetric(), "sum_value")
private("torchmetrics", Running(SumMetric()), "_num_vals_seen")


def add_to_sum(metric: SumMetric, value: Tensor | float) -> None:
    """Add ``value`` (), without a gradient, like ``metric.update`` but without its checks, which take ten times as long."""
    state = vars(metric)
    state["sum_value"] = state["sum_value"] + value
    state["_update_count"] += 1
    state["_computed"] = None


def sum_on_rank(metric: SumMetric) -> Tensor:
    """The sum () of the values of this rank; a live tensor."""
    total: Tensor = metric.sum_value
    return total


_PLAIN: dict[type[Metric], tuple[str, ...]] = {MinMaxMetric: ("min_val", "max_val"), Running: ("_num_vals_seen",)}
"""What these wrappers keep in attributes instead of states."""


def capture_metric(metric: Metric) -> dict[str, Any]:
    """Number of updates and state of ``metric`` on this rank: live tensors, or lists of them, by name."""
    plain = {name: getattr(metric, name) for cls, names in _PLAIN.items() if isinstance(metric, cls) for name in names}
    return {
        "count": metric._update_count,
        "values": {name: getattr(metric, name) for name in metric._defaults},
        "plain": plain,
    }


def copy_states(metric: Metric) -> dict[str, Any]:
    """Copy the states of ``metric`` on this rank, its number of updates and its newest value of a step, by name."""
    states = {name: getattr(metric, name) for name in metric._defaults}
    copies = {name: list(value) if isinstance(value, list) else value.clone() for name, value in states.items()}
    return {**copies, "_update_count": metric._update_count, "_forward_cache": metric._forward_cache}


def default_states(metric: Metric) -> dict[str, Any]:
    """What ``copy_states`` returns before the first update of ``metric``."""
    return {**copy.deepcopy(metric._defaults), "_update_count": 0, "_forward_cache": None}


def set_states(metric: Metric, states: Mapping[str, Any], keeps_newest: bool = False) -> None:
    """Set the states of ``metric`` to what ``copy_states`` or ``default_states`` returned; may keep its newest value.

    It does not restore 0 updates: torchmetrics would warn when a rank computes a metric that only others have updated.
    """
    for name, value in states.items():
        if (name == "_update_count" and not value) or (name == "_forward_cache" and keeps_newest):
            continue
        setattr(metric, name, value.to(metric.device) if isinstance(value, Tensor) else value)
    metric._computed = None


def merge_metric(metric: Metric, saved: Mapping[str, Any], reduce: Callable[[Tensor], Tensor] | None = None) -> None:
    """Add the updates in ``saved``, from ``capture_metric``, to those that ``metric`` has accumulated.

    ``reduce`` combines the stacked states, shape (2, *state); None takes the metric's own reductions.
    """
    is_new = metric._update_count == 0
    for name, value in saved["values"].items():
        own = getattr(metric, name)
        if isinstance(value, list):
            setattr(metric, name, [*own, *(item.to(metric.device) for item in value)])
            continue
        value = value.to(metric.device)
        combine: Any = reduce or metric._reductions[name]
        setattr(metric, name, value if is_new or combine is None else combine(torch.stack([own, value])))
    for name, value in saved.get("plain", {}).items():
        setattr(metric, name, value.to(metric.device) if isinstance(value, Tensor) else value)
    metric._update_count += saved["count"]
    metric._computed = None
