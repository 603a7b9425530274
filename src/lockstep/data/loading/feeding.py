"""Copy each batch to the GPU on a side stream during the previous step."""

import logging
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from lockstep.compat.lightning_fetchers import AheadFetcher, is_plain_fetcher
from lockstep.compat.torch import tree_leaves, tree_map_only

log = logging.getLogger(__name__)

Hook = Literal["on_before_batch_transfer", "transfer_batch_to_device"]


class DeviceFeeder:
    """Copies batches to ``device`` on a side stream.

    Only tensors in dicts, lists and tuples: the Trainer moves everything else, and calls all hooks, when the step begins.

    Args:
        streams: A module with ``Stream``, ``stream`` and ``current_stream`` as in ``torch.cuda``.
    """

    def __init__(self, device: torch.device, streams: Any = torch.cuda) -> None:
        self._device, self._streams = device, streams
        self._side = streams.Stream(device)

    def send(self, batch: Any) -> tuple[Any, Any]:
        """Start to copy ``batch``; return the copy, and the event of its end. The host waits if memory is not pinned."""
        with self._streams.stream(self._side):
            copied = tree_map_only(Tensor, self._copy, batch)
        return copied, self._side.record_event()

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def receive(self, copied: Any, end: Any) -> Any:
        """Make the current stream wait for ``end``, and return the copy."""
        current = self._streams.current_stream(self._device)
        current.wait_event(end)
        for leaf in tree_leaves(copied):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device.type:
                leaf.record_stream(current)  # its memory must not be reused before this stream has read it
        return copied


class FeedingFetcher(AheadFetcher):
    """Fetches one batch ahead, and copies it to the device during the step."""

    def __init__(self, feeder: DeviceFeeder) -> None:
        super().__init__()
        self._feeder = feeder

    def send(self, batch: Any) -> Any:
        return self._feeder.send(batch)

    def receive(self, sent: Any) -> Any:
        return self._feeder.receive(*sent)


def choose_fetcher(fetcher: Any, trainer: Trainer, loaders: list[Any]) -> Any:
    """A ``FeedingFetcher`` if batches may be copied ahead, else Lightning's ``fetcher``.

    Loaders without workers are excluded: they would prepare a batch before the hooks of the previous step, which may change
    the data.
    """
    feeder = make_feeder(trainer.strategy.root_device)
    if feeder is None or not is_plain_fetcher(fetcher):
        return fetcher
    if not all(isinstance(loader, DataLoader) and loader.num_workers for loader in loaders):
        return fetcher
    hooks: tuple[Hook, ...] = ("on_before_batch_transfer", "transfer_batch_to_device")
    for owner in filter(None, (trainer.lightning_module, getattr(trainer, "datamodule", None))):
        for name in hooks:
            if is_overridden(name, owner) and not getattr(getattr(owner, name), "takes_device_batches", False):
                text = "%s defines %s, which gets batches on the CPU, so each is copied to the GPU when its step begins"
                log.info(text, type(owner).__name__, name)
                return fetcher
    return FeedingFetcher(feeder)


def make_feeder(device: torch.device) -> DeviceFeeder | None:
    """A feeder of ``device``; None if there is nothing to copy."""
    return DeviceFeeder(device) if device.type == "cuda" else None
