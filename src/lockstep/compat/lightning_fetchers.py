"""A Lightning fetcher that fetches the next batch before the current one is used."""

from contextlib import suppress
from typing import Any

from lockstep.compat import private_imports

with private_imports("lightning"):
    from lightning.pytorch.loops.fetchers import _DataFetcher as DataFetcher
    from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher


class AheadFetcher(DataFetcher):
    """Fetches one batch ahead of training, also from loaders with a length.

    Attributes:
        batches: Batches that are fetched but not trained on yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Any] = []

    def __iter__(self) -> "AheadFetcher":
        super().__iter__()
        self._fetch()
        self.done = not self.batches
        return self

    def __next__(self) -> Any:
        if not self.batches:
            self.done = True
            raise StopIteration
        sent, number, loader = self.batches.pop(0)
        self._fetch()
        self.done = not self.batches
        return self.receive(sent), number, loader

    def _fetch(self) -> None:
        if self.length is None or self.fetched < self.length:
            with suppress(StopIteration):
                batch, number, loader = super().__next__()
                self.batches.append((self.send(batch), number, loader))

    def reset(self) -> None:
        super().reset()
        self.batches = []

    def send(self, batch: Any) -> Any:
        """Called with each batch as soon as it is fetched."""
        raise NotImplementedError

    def receive(self, sent: Any) -> Any:
        """Return the batch to train on, from what ``send`` returned."""
        raise NotImplementedError


def is_plain_fetcher(fetcher: Any) -> bool:
    """Whether the loop takes the batches from ``fetcher``, not ``training_step`` itself (``dataloader_iter``)."""
    return type(fetcher) is _PrefetchDataFetcher
