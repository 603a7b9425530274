"""Write the predictions of all ranks to one file, each sample once, in the order of the data set.

``predictions.safetensors`` holds the outputs of ``predict_step``, of any type and shape, with one row per sample. A tensor is
stored as ``predictions``, those of a dict under their keys, those of a tuple as ``0``, ``1`` … Each rank writes its rows to the
run folder as it predicts them; rank zero merges them.
"""

import operator
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from safetensors import SafetensorError
from torch import Tensor

from lockstep.core import RunError, UsageError, World, atomic_write
from lockstep.data.loading import SampleKey, ShardedLoader
from lockstep.distributed import broadcast_from_rank_zero
from lockstep.trainer.context import RunContext
from lockstep.trainer.prediction_parts import Part, PartWriter, TensorType, merge_parts


def run_prediction(
    context: RunContext, trainer: Trainer, module: LightningModule, data: LightningDataModule | None, checkpoint: str | None
) -> int:
    """Predict the samples of ``predict_dataloader`` and return their number; every rank must call this.

    Raises:
        UsageError: The module or the data cannot predict.
        RunError: The loader has no batches, the outputs of ``predict_step`` do not fit into one file, or writing failed.
    """
    if not is_overridden("predict_dataloader", data) and not is_overridden("predict_dataloader", module):
        raise UsageError(
            f"data: {type(data or module).__name__} has no predict_dataloader; define it to choose what to predict."
        )
    if not is_overridden("predict_step", module) and not is_overridden("forward", module):
        raise UsageError(f"model: {type(module).__name__} has neither predict_step nor forward; define one of them.")
    run, world = context.run, context.world
    # One folder per attempt: an older attempt may still run on a node that Slurm has given up.
    writer = PredictionWriter(run.folder / f".predictions-{context.attempt}", world)
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    trainer.predict(module, datamodule=data, return_predictions=False, ckpt_path=checkpoint, weights_only=True)
    if not writer.samples:
        raise RunError(
            "predict_dataloader gave no batch, so there are no predictions; check the data and trainer.limit_predict_batches."
        )

    def merge() -> int:
        run.check_owner(context.attempt)
        return _merge_predictions(writer.folder, world.size, run.predictions)

    return broadcast_from_rank_zero(merge, world)


class PredictionWriter(Callback):
    """Write the outputs of ``predict_step`` on this rank, with the indices of their samples, to ``folder``.

    Attributes:
        samples: Number of samples predicted on this rank.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world, self.samples = folder, world, 0
        self._part = PartWriter(folder, world.rank)
        self._batch_indices: Iterator[list[int]] | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaders = CombinedLoader(trainer.predict_dataloaders, "sequential").flattened
        if len(loaders) != 1:
            raise UsageError(
                f"data: predict_dataloader returns {len(loaders)} loaders; "
                "return one, with a ConcatDataset to predict several data sets."
            )
        if isinstance(loaders[0], ShardedLoader):
            self._batch_indices = ([_row(key) for key in batch] for batch in loaders[0].global_batches)
        elif self.world.size > 1:
            raise UsageError(
                f"data: predict_dataloader chooses the samples of each of {self.world.size} ranks itself, in an unknown order; "
                "use one rank, or a DataLoader of a map-style data set without its own batch sampler."
            )

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        tensors = _name_outputs(outputs)
        lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
        following = range(self.samples, self.samples + max(lengths))
        indices = next(self._batch_indices) if self._batch_indices else following
        if lengths != {len(indices)}:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise RunError(
                f"predict_step returns {shapes} for {len(indices)} samples; the first dimension must be {len(indices)}."
            )
        self.samples += len(indices)
        types = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()}
        _check_same_types(types, self._part.types or types)
        with self._named_errors():
            self._part.append(indices, {name: tensor.detach().cpu() for name, tensor in tensors.items()})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self._named_errors():
            self._part.close()
        trainer.strategy.barrier("predictions")  # inside the loop, where the watchdog sees a rank that does not arrive

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._part.discard()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError where the disk is full
            raise RunError(f"The predictions of rank {self.world.rank} cannot be written ({error}).") from error


def _row(key: SampleKey) -> int:
    """The index of a sample in the data set; its position in the epoch if the sampler does not yield integers."""
    _, position, index = key
    try:
        return operator.index(index)
    except TypeError:
        return position


def _name_outputs(outputs: Any) -> dict[str, Tensor]:
    """Return the output of ``predict_step`` as tensors by name; raise RunError if it contains anything but tensors."""
    named = outputs
    if isinstance(outputs, Tensor):
        named = {"predictions": outputs}
    elif isinstance(outputs, list | tuple):
        named = dict(enumerate(outputs))
    elif not isinstance(outputs, Mapping):
        named = {"": outputs}
    others = [f"{name} {type(value).__name__}".strip() for name, value in named.items() if not isinstance(value, Tensor)]
    if others or not named:
        raise RunError(
            f"predict_step returns {', '.join(others) or 'nothing'}; "
            "return a tensor, or a dict or tuple of tensors, whose first dimension is the batch."
        )
    return {str(name): value for name, value in named.items()}


def _check_same_types(types: Mapping[str, TensorType], first: Mapping[str, TensorType]) -> None:
    """Raise RunError if the outputs of a batch differ in type or shape from those of the first batch."""
    for name in sorted(types.keys() | first.keys()):
        here, there = _describe_type(types.get(name)), _describe_type(first.get(name))
        if here != there:
            raise RunError(
                f"predict_step returns {name} as {there} for one batch and as {here} for another; "
                "only the first dimension may differ between batches."
            )


def _describe_type(kind: TensorType | None) -> str:
    return "nothing" if kind is None else f"{kind[0]} ({', '.join(['batch', *map(str, kind[1])])})"


def _merge_predictions(folder: Path, ranks: int, path: Path) -> int:
    """Write the rows of all ranks to ``path``, delete them, and return the number of samples."""
    try:
        parts = [Part.open(folder, rank) for rank in range(ranks)]
        for part in parts:
            _check_same_types(part.types, parts[0].types)
        samples = 0

        def write(temporary: Path) -> None:
            nonlocal samples
            samples = merge_parts(parts, temporary)

        atomic_write(path, write)
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:  # KeyError: safetensors lacks the type
        raise RunError(f"{path} cannot be written ({error}).") from error
    for left in path.parent.glob(".predictions-*"):
        shutil.rmtree(left, ignore_errors=True)
    return samples
