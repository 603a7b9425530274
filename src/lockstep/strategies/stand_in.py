"""A step on a stand-in batch: a rank whose samples were all skipped takes part in the step, but does not change the result."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from lockstep.compat.lightning import is_reduced_in_step, logged_results
from lockstep.compat.torchmetrics import copy_states, default_states, set_states


@contextmanager
def undo_step(module: LightningModule) -> Iterator[None]:
    """Undo what a step of ``module`` changes in its buffers, its metrics and the values that it logs.

    Metrics and values that it logs for the first time stay, without a sample: the ranks reduce them together. The newest value
    remains that of the last step, unless the ranks have reduced it: there this rank has weight 0. Buffers of
    synchronized batch norm, which count no sample of an empty batch, keep what the other ranks have added.
    """
    buffers = [
        (part, key, buffer)
        for part in module.modules()
        if "SyncBatchNorm" not in type(part).__name__
        for key, buffer in part.named_buffers(recurse=False, remove_duplicate=False)
    ]
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    before = {id(metric): copy_states(metric) for metric in (*metrics, *logged_results(module.trainer))}  # a hash changes
    # The step writes to copies, DDP's broadcast included. They are not written back: backward needs what batch norm has read.
    copies = {id(buffer): buffer.clone() for _, _, buffer in buffers}  # parts may share a buffer
    for part, key, buffer in buffers:
        setattr(part, key, copies[id(buffer)])
    yield
    for part, key, buffer in buffers:
        setattr(part, key, buffer)
    for metric in metrics:
        set_states(metric, before[id(metric)])
    for result in logged_results(module.trainer):
        saved = before[id(result)] if id(result) in before else default_states(result)
        set_states(result, saved, keeps_newest=is_reduced_in_step(result))


def without_weight(output: Any) -> Any:
    """What ``training_step`` returned, with a loss of 0 and gradients of 0: the mean over no samples is NaN."""
    if isinstance(output, Tensor):
        return torch.nan_to_num(output, 0.0, 0.0, 0.0) * 0
    return {**output, "loss": without_weight(output["loss"])} if isinstance(output, dict) and "loss" in output else output
