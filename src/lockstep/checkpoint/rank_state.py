"""What of a rank lightning's checkpoint leaves out: random numbers, metrics, and what was logged but not yet reduced.

Plain tensors and numbers only, so that it loads with ``weights_only``.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torchmetrics import Metric

from lockstep.checkpoint.serialization import State


def capture_state(trainer: Trainer) -> State:
    """The state of this rank between two steps; tensors are the live ones."""
    module = trainer.lightning_module
    connector = trainer._logger_connector
    state: State = {
        "random": capture_rng_state(trainer.strategy.root_device),
        "metrics": {name: _metric_state(m) for name, m in module.named_modules() if isinstance(m, Metric)},
        "results": {key: _result_state(result) for key, result in _result_metrics(trainer).items() if not result.has_reset},
        "callback_metrics": dict(connector._callback_metrics),
        "logged_metrics": dict(connector._logged_metrics),
        "should_stop": trainer.should_stop,
    }
    if not module.automatic_optimization:  # gradients may be half-way through an accumulation that only the user knows of
        state["gradients"] = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return state


def restore_state(trainer: Trainer, states: Sequence[State], seed: int) -> None:
    """Make this rank what ``states`` say: one state, if the world is as large as it was; else those it takes over.

    Args:
        trainer: With model and loops in place.
        states: The state of this rank; or, in another world, those of the ranks that it stands for, perhaps none.
        seed: For the random numbers of a rank that has no predecessor of its own.
    """
    module, connector = trainer.lightning_module, trainer._logger_connector
    for name, metric in module.named_modules():
        if isinstance(metric, Metric):
            metric.reset()
            for state in states:
                if name in state["metrics"]:
                    _merge_metric(metric, state["metrics"][name])
    results = _result_metrics(trainer)
    results.clear()
    for state in states:
        for key, saved in state["results"].items():
            if key not in results:
                results[key] = _make_result(saved, trainer)
            _merge_metric(results[key], saved["metric"])
    for state in states[:1]:
        connector._callback_metrics.update(state["callback_metrics"])
        connector._logged_metrics.update(state["logged_metrics"])
        trainer.should_stop = state["should_stop"]
        for name, gradient in state.get("gradients", {}).items():
            parameter = module.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
    # Else the first batch would be taken for the first of its epoch, and forget what was logged before.
    connector._first_loop_iter = False
    if len(states) == 1:
        restore_rng_state(states[0]["random"], trainer.strategy.root_device)
    else:
        torch.manual_seed(seed)


def capture_rng_state(device: torch.device) -> State:
    """Where the random numbers of torch (CPU and ``device``), numpy and random stand."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "random": (version, torch.tensor(words), gauss),
    }


def restore_rng_state(state: State, device: torch.device) -> None:
    """Put the random numbers back to where ``state`` says."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, words, gauss = state["random"]
    random.setstate((version, tuple(words.tolist()), gauss))


def _metric_state(metric: Metric) -> State:
    return {"count": metric._update_count, "values": {name: getattr(metric, name) for name in metric._defaults}}


def _merge_metric(metric: Metric, saved: State) -> None:
    """Add what another metric of the kind has seen; to a fresh one that is all of it."""
    fresh = metric._update_count == 0
    for name, value in saved["values"].items():
        mine = getattr(metric, name)
        if isinstance(value, list):
            setattr(metric, name, [*mine, *(item.to(metric.device) for item in value)])
            continue
        value = value.to(metric.device)
        reduction: Any = metric._reductions[name]
        if isinstance(metric, _ResultMetric) and not metric.meta.is_mean_reduction:
            reduction = metric.meta.reduce_fx
        setattr(metric, name, value if fresh or reduction is None else reduction(torch.stack([mine, value])))
    metric._update_count += saved["count"]
    metric._computed = None


_METADATA_FIELDS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip


def _result_metrics(trainer: Trainer) -> dict[str, _ResultMetric]:
    return trainer.fit_loop.epoch_loop._results


def _result_state(result: _ResultMetric) -> State:
    meta = result.meta
    return {
        "meta": {name: getattr(meta, name) for name in _METADATA_FIELDS} | {"reduce_fx": meta.reduce_fx.__name__},
        "sync": {"_should": meta.sync._should, "rank_zero_only": meta.sync.rank_zero_only},
        "is_tensor": result.is_tensor,
        "last": result._forward_cache,
        "metric": _metric_state(result) if result.is_tensor else {"count": result._update_count, "values": {}},
    }


def _make_result(saved: State, trainer: Trainer) -> _ResultMetric:
    """A result that has seen nothing yet, of the same kind."""
    meta = _Metadata(**saved["meta"])
    meta.sync = _Sync(fn=trainer.strategy.reduce, **saved["sync"])
    made = _ResultMetric(meta, saved["is_tensor"])
    if not saved["is_tensor"]:
        made.value = trainer.lightning_module.get_submodule(meta.metric_attribute or "")
    made._forward_cache = saved["last"]
    return made.to(trainer.strategy.root_device)
