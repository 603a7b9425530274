"""What of a rank lightning's checkpoint leaves out: random numbers, metrics, and what was logged but not yet reduced.

Plain tensors and numbers only, so that it loads with ``weights_only``.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from io import BytesIO
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor
from torchmetrics import Metric

from lockstep.errors import RunError

State = dict[str, Any]


def take_state(trainer: Trainer) -> State:
    """The state of this rank between two steps; tensors are the live ones."""
    module = trainer.lightning_module
    connector = trainer._logger_connector
    state: State = {
        "random": random_state(trainer.strategy.root_device),
        "metrics": {name: _metric(m) for name, m in module.named_modules() if isinstance(m, Metric)},
        "results": {key: _result(result) for key, result in _results(trainer).items() if not result.has_reset},
        "callback_metrics": dict(connector._callback_metrics),
        "logged_metrics": dict(connector._logged_metrics),
        "should_stop": trainer.should_stop,
    }
    if not module.automatic_optimization:  # gradients may be half-way through an accumulation that only the user knows of
        state["gradients"] = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return state


def put_state(trainer: Trainer, states: Sequence[State], seed: int) -> None:
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
                    _add(metric, state["metrics"][name])
    results = _results(trainer)
    results.clear()
    for state in states:
        for key, saved in state["results"].items():
            if key not in results:
                results[key] = _made(saved, trainer)
            _add(results[key], saved["metric"])
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
        restore_random_state(states[0]["random"], trainer.strategy.root_device)
    else:
        torch.manual_seed(seed)


def random_state(device: torch.device) -> State:
    """Where the random numbers of torch (CPU and ``device``), numpy and random stand."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "random": (version, torch.tensor(words), gauss),
    }


def restore_random_state(state: State, device: torch.device) -> None:
    """Put the random numbers back to where ``state`` says."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, words, gauss = state["random"]
    random.setstate((version, tuple(words.tolist()), gauss))


def _metric(metric: Metric) -> State:
    return {"count": metric._update_count, "values": {name: getattr(metric, name) for name in metric._defaults}}


def _add(metric: Metric, saved: State) -> None:
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


_FLAGS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip


def _results(trainer: Trainer) -> dict[str, _ResultMetric]:
    return trainer.fit_loop.epoch_loop._results


def _result(result: _ResultMetric) -> State:
    meta = result.meta
    return {
        "meta": {name: getattr(meta, name) for name in _FLAGS} | {"reduce_fx": meta.reduce_fx.__name__},
        "sync": {"_should": meta.sync._should, "rank_zero_only": meta.sync.rank_zero_only},
        "is_tensor": result.is_tensor,
        "last": result._forward_cache,
        "metric": _metric(result) if result.is_tensor else {"count": result._update_count, "values": {}},
    }


def _made(saved: State, trainer: Trainer) -> _ResultMetric:
    """A result that has seen nothing yet, of the same kind."""
    meta = _Metadata(**saved["meta"])
    meta.sync = _Sync(fn=trainer.strategy.reduce, **saved["sync"])
    made = _ResultMetric(meta, saved["is_tensor"])
    if not saved["is_tensor"]:
        made.value = trainer.lightning_module.get_submodule(meta.metric_attribute or "")
    made._forward_cache = saved["last"]
    return made.to(trainer.strategy.root_device)


def on_cpu(value: Any) -> Any:
    """A copy of ``value``, however nested, whose tensors are on the CPU and shared with nobody."""
    return _with_tensors(value, lambda tensor: tensor.detach().to("cpu", copy=True))


def _with_tensors(value: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """``value``, however nested, with what ``make`` makes of its tensors."""
    if isinstance(value, Tensor):
        return make(value)
    if isinstance(value, dict):
        return type(value)((key, _with_tensors(item, make)) for key, item in value.items())
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_with_tensors(item, make) for item in value)
    return value


def plain(value: Any) -> Any:
    """``value`` without what ``torch.load(weights_only=True)`` would refuse."""
    if value is None or isinstance(value, bool | int | float | str | Tensor | torch.dtype):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def allow_numpy() -> None:
    """Let ``torch.load(weights_only=True)`` load arrays and numbers of numpy, of which states of one's own are often made."""
    kinds = [kind for name, kind in vars(np.dtypes).items() if name.endswith("DType") and name != "ObjectDType"]
    multiarray: Any = import_module("numpy._core.multiarray")
    torch.serialization.add_safe_globals([np.ndarray, np.dtype, multiarray.scalar, multiarray._reconstruct, *kinds])


def refuse_unloadable(state: Mapping[str, Any]) -> None:
    """Raise a RunError if ``torch.load(weights_only=True)`` would refuse ``state``: a run must not train for what is lost."""
    if (found := _unloadable(state, "")) is not None:
        place, reason = found
        named = re.search(r"GLOBAL (\S+)", reason)
        what = named[1] if named else " ".join(reason.split())
        raise RunError(
            f"A checkpoint cannot hold {place} ({what}): torch.load(weights_only=True) would refuse it; "
            "give tensors, numbers, texts, lists and dicts there (in state_dict or on_save_checkpoint)."
        )


def _unloadable(value: Any, place: str) -> tuple[str, str] | None:
    """Where in ``value`` it is that cannot be loaded, and why; None if all of it can."""
    file = BytesIO()
    try:
        torch.save(_with_tensors(value, lambda tensor: tensor.detach().to("meta")), file)
        file.seek(0)
        torch.load(file, weights_only=True)
        return None
    except Exception as error:  # pickle raises what it likes
        if isinstance(value, dict):
            for key, item in value.items():
                if (found := _unloadable(item, f"{place}[{key!r}]")) is not None:
                    return found
        return place, str(error)
