"""Predictions: every sample once, in one file, in the order of the data set, whatever the number of ranks.

``predictions.safetensors`` holds whatever ``predict_step`` returns, of any type and shape, a row for each sample: a tensor as
``predictions``, those of a dict by name, those of a tuple as ``0``, ``1`` … Each rank keeps its own rows in the memory of the
CPU and leaves them in the run folder; rank zero puts all of them together.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lockstep.core import RunError, UsageError, World, atomic_write
from lockstep.data import GlobalBatchSampler
from lockstep.distributed import broadcast_from_rank_zero
from lockstep.runs import Run

OutputTypes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The type of each output and its shape without the first dimension."""


def run_prediction(
    trainer: Trainer, module: LightningModule, data: LightningDataModule, checkpoint: str | None, run: Run, attempt: int
) -> dict[str, Any]:
    """Predict the samples of ``predict_dataloader``; every rank must call.

    Returns:
        What ``result.json`` says of it: how many samples, and the file.

    Raises:
        UsageError: The module or the data cannot predict.
        RunError: What ``predict_step`` returns cannot be put into one file, or the file cannot be written.
    """
    if not is_overridden("predict_dataloader", data) and not is_overridden("predict_dataloader", module):
        raise UsageError(
            f"data: {type(data).__name__} has no predict_dataloader, which says what is to be predicted; define it."
        )
    if not is_overridden("predict_step", module) and not is_overridden("forward", module):
        raise UsageError(f"model: {type(module).__name__} has neither predict_step nor forward; define one of them.")
    strategy: Any = trainer.strategy
    # An older attempt may live on, on a node that Slurm has given up: it does not write into this one's folder.
    rows = PredictionWriter(run.folder / f".predictions-{attempt}", strategy.sharding.world)
    owner: Any = trainer
    owner.callbacks.append(rows)
    trainer.predict(module, datamodule=data, return_predictions=False, ckpt_path=checkpoint, weights_only=True)
    if not rows.batches:
        raise RunError("Nothing was predicted: predict_dataloader gave no batch, or trainer.limit_predict_batches allows none.")
    samples = broadcast_from_rank_zero(lambda: _merge_predictions(rows.folder, rows.world.size, run.predictions), rows.world)
    return {"samples": samples, "predictions": str(run.predictions)}


class PredictionWriter(Callback):
    """Keeps what ``predict_step`` returns on this rank, and of which samples, and leaves it in a folder at the end.

    Args:
        folder: Where the rows of all ranks go.
        world: Who shares the samples.

    Attributes:
        batches: What was predicted, in the memory of the CPU.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.batches: list[dict[str, Tensor]] = []
        self._draws: Iterator[list[int]] | None = None
        self._indices: list[int] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaders = CombinedLoader(trainer.predict_dataloaders, "sequential").flattened
        if len(loaders) != 1:
            raise UsageError(
                f"data: predict_dataloader gives {len(loaders)} loaders; give one, of a ConcatDataset for several sets."
            )
        batches = getattr(loaders[0], "batch_sampler", None)
        if isinstance(batches, GlobalBatchSampler):
            self._draws = ([index for _, index in batch] for batch in batches)
        elif self.world.size > 1:
            raise UsageError(
                f"data: predict_dataloader decides itself which samples each of {self.world.size} ranks gets, and nobody knows "
                "their order; use one rank, or a DataLoader of a data set with a length, without a batch sampler of its own."
            )

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        tensors = _by_name(outputs)
        rows = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
        known = len(self._indices)
        indices = next(self._draws) if self._draws else range(known, known + max(rows))
        if rows != {len(indices)}:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise RunError(f"predict_step returns {shapes} for {len(indices)} samples; the first dimension must be theirs.")
        self._indices += indices
        self.batches.append({name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()})
        _check_same_types(_output_types(self.batches[-1]), _output_types(self.batches[0]))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.batches:
            joined = {name: torch.cat([batch[name] for batch in self.batches]) for name in self.batches[0]}
            try:
                self.folder.mkdir(exist_ok=True)
                torch.save({"indices": torch.tensor(self._indices), "tensors": joined}, self.folder / f"{self.world.rank}.pt")
            except (OSError, RuntimeError) as error:  # torch tells a full disk in its own way
                raise RunError(f"The predictions of rank {self.world.rank} cannot be written ({error}).") from error
        trainer.strategy.barrier("predictions")  # here, where a rank that never comes is noticed


def _by_name(outputs: Any) -> dict[str, Tensor]:
    """What ``predict_step`` returned, as named tensors."""
    named = outputs
    if isinstance(outputs, Tensor):
        named = {"predictions": outputs}
    elif isinstance(outputs, list | tuple):
        named = dict(enumerate(outputs))
    elif not isinstance(outputs, Mapping):
        named = {"": outputs}
    odd = [f"{name} {type(value).__name__}".strip() for name, value in named.items() if not isinstance(value, Tensor)]
    if odd or not named:
        raise RunError(
            f"predict_step returns {', '.join(odd) or 'nothing'}; "
            "return a tensor, or a dict or tuple of tensors, whose first dimension is the batch."
        )
    return {str(name): value for name, value in named.items()}


def _output_types(tensors: Mapping[str, Tensor]) -> OutputTypes:
    return {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()}


def _check_same_types(kinds: OutputTypes, first: OutputTypes) -> None:
    """Raise RunError where a batch is not of the kind of the first one."""
    for name in sorted(kinds.keys() | first.keys()):
        if (here := kinds.get(name)) != (there := first.get(name)):
            raise RunError(
                f"predict_step returns {name} as {_describe_type(there)} for one batch and "
                f"as {_describe_type(here)} for another; all must be alike but for the first dimension."
            )


def _describe_type(kind: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "nothing" if kind is None else f"{kind[0]} ({', '.join(['batch', *map(str, kind[1])])})"


def _merge_predictions(folder: Path, ranks: int, path: Path) -> int:
    """Write ``path`` from the rows of all ranks, remove those, and return the number of samples."""
    try:
        parts = [torch.load(folder / f"{rank}.pt", weights_only=True, mmap=True) for rank in range(ranks)]
        for part in parts:
            _check_same_types(_output_types(part["tensors"]), _output_types(parts[0]["tensors"]))
        order = torch.cat([part["indices"] for part in parts]).argsort(stable=True)
        whole = {name: torch.cat([part["tensors"][name] for part in parts])[order] for name in parts[0]["tensors"]}
        atomic_write(path, lambda beside: save_file(whole, beside))
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:  # KeyError: a type that the format does not have
        raise RunError(f"{path} cannot be written ({error}).") from error
    for left in path.parent.glob(".predictions-*"):
        shutil.rmtree(left, ignore_errors=True)
    return len(order)
