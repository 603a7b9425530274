"""Lightning's loop over the batches of an epoch, with public hooks and less work for the host in each step.

``_advance`` does what Lightning's ``advance`` does, in the same order. It omits what only a profiler, a restart in
Lightning's sense or a ``dataloader_iter`` needs; with one of these, Lightning's ``advance`` runs.
"""

import functools
import math
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lockstep.compat import patch, private, private_imports
from lockstep.compat.lightning_hooks import calls_hooks_fast

with private_imports("lightning"):
    from lightning.pytorch.loops.fetchers import _DataFetcher as DataFetcher
    from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
    from lightning.pytorch.loops.optimization.automatic import ClosureResult, _AutomaticOptimization
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.trainer import call
    from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector
    from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection

# Methods too: an override of one that Lightning no longer calls would silently do nothing.
for _owner, _names in (
    (_TrainingEpochLoop, ("_broadcast_sigterm_tensor", "_on_after_fetch", "_on_before_fetch", "_build_kwargs")),
    (_TrainingEpochLoop, ("_is_training_done", "_num_ready_batches_reached", "_should_accumulate", "_should_check_val_fx")),
    (_AutomaticOptimization, ("output_result_cls",)),
    (ClosureResult, ("from_training_step_output",)),
    (_DataHookSelector, ("get_instance",)),
    (_LoggerConnector, ("log_metrics", "on_batch_end", "on_batch_start", "should_update_logs", "update_train_step_metrics")),
    (LightningModule, ("_apply_batch_transfer_handler", "_call_batch_hook", "_on_before_batch_transfer")),
):
    for _name in _names:
        private("lightning", _owner, _name)


def is_log_step(trainer: Trainer) -> bool:
    """Whether ``log_every_n_steps`` is due after this optimizer step; equal on all ranks. For training hooks."""
    return _is_regular(trainer) and not trainer.fit_loop.epoch_loop._should_accumulate()


def _log_interval(trainer: Trainer) -> int:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every


def _is_due(trainer: Trainer) -> bool:
    return _log_interval(trainer) != 0 and (_is_regular(trainer) or trainer.should_stop)


def _is_regular(trainer: Trainer) -> bool:
    every = _log_interval(trainer)
    return every != 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


def cache_batch_hooks(trainer: Trainer) -> None:
    """Look up once, not in each step, whether the module or the DataModule has the hooks that move a batch to the device."""
    selector = private("lightning", private("lightning", trainer, "_data_connector"), "_datahook_selector")
    find = functools.partial(_DataHookSelector.get_instance, selector)
    patch("lightning", selector, "get_instance", functools.cache(find))


class _Results(_ResultCollection):
    """The values that are logged in training.

    Attributes:
        has_changed: Whether any was logged or reset since it was last set to false.
        new: Keys of the values that the batches of the current step have logged.
    """

    has_changed = True
    _is_new_only = False

    def __init__(self, training: bool) -> None:
        super().__init__(training)
        self.new: set[str] = set()
        self._arguments: dict[str, Any] = {}  # those with which each value was logged

    @contextmanager
    def only_new(self) -> Iterator[None]:
        """Show only the values that the current step has logged."""
        self._is_new_only = True
        try:
            yield
        finally:
            self._is_new_only = False

    def valid_items(self) -> Generator[tuple[str, Any], None, None]:
        items: Generator[tuple[str, Any], None, None] = super().valid_items()
        return (item for item in items if item[0] in self.new) if self._is_new_only else items

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def log(self, fx: str, name: str, value: Any, batch_size: int | None = None, **arguments: Any) -> None:
        """Log ``value``; do not check the arguments again if they are those of the previous call, and it is a tensor."""
        key = f"{fx}.{name}"
        known = self.get(key)
        if (
            known is None
            or not isinstance(value, Tensor)
            or arguments != self._arguments.get(key)
            or arguments["enable_graph"]
            or value.device != known.value.device
        ):
            super().log(fx, name, value, batch_size=batch_size, **arguments)
            self._arguments[key] = arguments
        else:
            self.update_metrics(key, value.detach(), self._extract_batch_size(known, batch_size, known.meta))

    def update_metrics(self, key: str, *args: Any, **kwargs: Any) -> None:
        self.has_changed = True
        self.new.add(key)
        super().update_metrics(key, *args, **kwargs)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.has_changed = True
        super().reset(*args, **kwargs)


class _Result(ClosureResult):
    @classmethod
    def from_training_step_output(cls, training_step_output: Any, normalize: int = 1) -> ClosureResult:
        if normalize == 1 and isinstance(training_step_output, Tensor):  # Lightning divides it by 1
            return cls(training_step_output)
        return super().from_training_step_output(training_step_output, normalize)


class LightningEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, without its broadcast at each step and with public hooks.

    Attributes:
        validation_due: With ``val_check_interval`` as a time: whether a validation follows the newest step, on all ranks.
        copy_seconds: Total seconds in which the host has moved batches to the device.
    """

    validation_due = False
    copy_seconds = 0.0
    _results: _Results

    def __init__(self, trainer: Trainer, min_steps: int | None = None, max_steps: int = -1) -> None:
        super().__init__(trainer, min_steps, max_steps)
        private("lightning", trainer, "_val_check_time_interval")
        patch("lightning", self.automatic_optimization, "output_result_cls", _Result)
        self._results = _Results(training=True)
        self._step_names: tuple[Any, tuple[str, ...]] = (None, ())
        connector = trainer._logger_connector
        self._write_row = connector.update_train_step_metrics
        patch("lightning", connector, "update_train_step_metrics", self._update_row)

    @property
    def validation_interval(self) -> float | None:
        """``val_check_interval`` in seconds, if it is a time."""
        interval: float | None = self.trainer._val_check_time_interval
        return interval

    def _update_row(self) -> None:
        """Log a row; between two regular ones, only if training ends, and only what the last step has logged."""
        if self.trainer.fast_dev_run or _is_regular(self.trainer):
            self._write_row()
            return
        if self.trainer.should_stop:
            self.settle_stop()
        if self.trainer.should_stop:
            with self._results.only_new():
                self._write_row()

    def settle_stop(self) -> None:
        """Called after a step that ends with ``Trainer.should_stop`` set; it may reset the flag."""

    def advance(self, data_fetcher: DataFetcher) -> None:
        if (self.batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:  # the first batch of a step
            self._results.new.clear()
        if self.restarting or isinstance(data_fetcher, _DataLoaderIterDataFetcher) or not calls_hooks_fast(self.trainer):
            super().advance(data_fetcher)
        else:
            self._advance(data_fetcher)

    def _advance(self, fetcher: DataFetcher) -> None:
        trainer, progress = self.trainer, self.batch_progress
        module, connector = trainer.lightning_module, trainer._logger_connector
        if self.val_loop.restarting:
            self.val_loop.restarting = False
        batch, _, _ = next(fetcher)
        batch_idx = self.batch_idx + 1
        progress.is_last_batch = fetcher.done
        batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        begin = time.perf_counter()
        batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
        self.copy_seconds += time.perf_counter() - begin
        progress.increment_ready()
        self._begin_batch(batch)
        output: Any = None
        is_epoch_over = False
        if batch is None:
            self._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        else:
            call._call_callback_hooks(trainer, "on_train_batch_start", batch, batch_idx)
            is_epoch_over = call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, batch_idx) == -1
            call._call_strategy_hook(trainer, "on_train_batch_start", batch, batch_idx)
            if is_epoch_over:
                progress.increment_by(0, is_last_batch=True)
            else:
                progress.increment_started()
                arguments = self._build_kwargs(OrderedDict(), batch, batch_idx)
                if module.automatic_optimization:
                    output = self.automatic_optimization.run(trainer.optimizers[0], batch_idx, arguments)
                else:
                    output = self.manual_optimization.run(arguments)
        progress.increment_processed()
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        if is_epoch_over:
            raise StopIteration
        call._call_callback_hooks(trainer, "on_train_batch_end", output, batch, batch_idx)
        call._call_lightning_module_hook(trainer, "on_train_batch_end", output, batch, batch_idx)
        self._end_batch()
        progress.increment_completed()
        if trainer.fast_dev_run or _is_due(trainer):
            connector.update_train_step_metrics()

    def _build_kwargs(self, kwargs: OrderedDict[str, Any], batch: Any, batch_idx: int) -> OrderedDict[str, Any]:
        step = getattr(self.trainer.lightning_module.training_step, "__func__", None)
        if step is None or step is not self._step_names[0]:
            kwargs = super()._build_kwargs(kwargs, batch, batch_idx)
            self._step_names = step, tuple(kwargs)
            return kwargs
        kwargs.update(zip(self._step_names[1], (batch, batch_idx), strict=False))
        return kwargs

    def _begin_batch(self, batch: Any) -> None:
        connector, results = self.trainer._logger_connector, self._results
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None

    def _end_batch(self) -> None:
        connector, results = self.trainer._logger_connector, self._results
        if results.has_changed:
            connector.on_batch_end()
            results.has_changed = False
        results.batch = results.batch_size = None

    @property
    def _is_training_done(self) -> bool:
        return self._num_ready_batches_reached() if self.max_steps == -1 else super()._is_training_done

    def _should_accumulate(self) -> bool:
        return self.trainer.accumulate_grad_batches != 1 and super()._should_accumulate()

    def _should_check_val_fx(self, data_fetcher: DataFetcher) -> bool:
        if self.validation_interval is not None:  # in Lightning, each rank decides by its own clock
            patch("lightning", self.trainer, "_last_val_time", -math.inf if self.validation_due else math.inf)
        elif self._is_between_validations():
            return False
        return super()._should_check_val_fx(data_fetcher)

    def _is_between_validations(self) -> bool:
        """Whether the number of the current batch alone shows that no validation follows it."""
        trainer = self.trainer
        if self.batch_progress.is_last_batch or trainer.should_stop or math.isinf(trainer.val_check_batch):
            return False
        number = self.total_batch_idx if trainer.check_val_every_n_epoch is None else self.batch_idx
        return bool((number + 1) % trainer.val_check_batch)

    def on_advance_end(self, data_fetcher: DataFetcher) -> None:
        super().on_advance_end(data_fetcher)
        if self.validation_interval is not None and math.isfinite(self.trainer._last_val_time):
            self.after_validation()

    def after_validation(self) -> None:
        """Called after a validation, if ``val_check_interval`` is a time."""

    @property
    def seconds_since_validation(self) -> float:
        """Seconds since the newest validation, or since training began."""
        raise NotImplementedError

    def before_fetch(self) -> None:
        """Called before the loop takes the next batch."""

    def after_fetch(self) -> None:
        """Called when the loop has the next batch."""

    def validates_next(self, data_fetcher: DataFetcher) -> bool | None:
        """Return whether a validation follows the optimizer step that has just ended; None within an accumulated batch."""
        return None if self._should_accumulate() else self._should_check_val_fx(data_fetcher)

    def _broadcast_sigterm_tensor(self) -> None:
        pass

    def _on_before_fetch(self) -> None:
        self.before_fetch()
        super()._on_before_fetch()

    def _on_after_fetch(self) -> None:
        super()._on_after_fetch()
        self.after_fetch()
