"""Callbacks that write down what a run does on its device."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Inspector(Callback):
    """Write to a file what kind of tensors a run trains with, and the most memory that it has had on the GPU.

    Args:
        file: JSON file that rank zero writes after each step.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or trainer.global_step > 6:
            return
        on_gpu = trainer.strategy.root_device.type == "cuda"
        parameters = list(pl_module.parameters())
        filters = [p for p in parameters if p.ndim == 4 and p.shape[1] > 1]
        states = list(trainer.optimizers[0].state.values())
        found = {
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "channels_last": all(p.is_contiguous(memory_format=torch.channels_last) for p in filters),
            "fused": bool(trainer.optimizers[0].param_groups[0].get("fused")),
            "step": str(states[0]["step"].device.type) if states and "step" in states[0] else "",
            "pinned": bool(getattr(getattr(trainer.fit_loop._combined_loader, "flattened", [None])[0], "pin_memory", False)),
            "fetcher": type(trainer.fit_loop._data_fetcher).__name__,
            "peak": torch.cuda.max_memory_allocated() if on_gpu else 0,
        }
        self.file.write_text(json.dumps(found))
