"""Streams of other libraries, stopped after every batch and resumed: one Markdown table.

    python benchmarks/streams.py [--samples 2000]

Needs datasets, torchdata and litdata, each of which is left out where it is missing: pip install datasets torchdata litdata.
A row says after how many of the positions the rest of the epoch and the next epoch were equal bit for bit, how many batches a
resume by state reads again at most, and what lockstep says.
"""

import argparse
import importlib
import importlib.util
import io
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lockstep.core import World
from lockstep.data.loading import DataSharding, TrainingLoader

_BATCH = 16


def hugging_face(folder: Path, samples: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Parquet files, streamed, with and without a shuffle buffer."""
    datasets: Any = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    for shard in range(4):
        part = range(shard * samples // 4, (shard + 1) * samples // 4)
        datasets.Dataset.from_dict({"x": list(part)}).to_parquet(folder / f"{shard}.parquet")

    def stream() -> Any:
        files = [str(folder / f"{shard}.parquet") for shard in range(4)]
        found = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=folder / "cache")
        return found.with_format("torch")

    def shuffled() -> Any:
        return stream().shuffle(seed=3, buffer_size=100)

    yield "datasets, parquet", lambda: DataLoader(stream(), batch_size=_BATCH)
    yield "datasets, parquet, 2 workers", lambda: DataLoader(stream(), batch_size=_BATCH, num_workers=2)
    yield "datasets, shuffle buffer", lambda: DataLoader(shuffled(), batch_size=_BATCH)
    yield "datasets, shuffle buffer, 2 workers", lambda: DataLoader(shuffled(), batch_size=_BATCH, num_workers=2)


def torch_data(folder: Path, samples: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """StatefulDataLoader of a list."""
    stateful: Any = importlib.import_module("torchdata.stateful_dataloader").StatefulDataLoader
    numbers = [torch.tensor(number) for number in range(samples)]
    yield "StatefulDataLoader, shuffled", lambda: stateful(numbers, batch_size=_BATCH, shuffle=True)
    yield "StatefulDataLoader, 2 workers", lambda: stateful(numbers, batch_size=_BATCH, shuffle=True, num_workers=2)


def lit_data(folder: Path, samples: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """StreamingDataLoader of chunks on the disk."""
    litdata: Any = importlib.import_module("litdata")
    litdata.optimize(torch.tensor, list(range(samples)), str(folder / "chunks"), chunk_size=50, num_workers=1, verbose=False)

    def stream(shuffle: bool) -> Any:
        return litdata.StreamingDataset(str(folder / "chunks"), shuffle=shuffle, seed=3)

    yield "litdata", lambda: litdata.StreamingDataLoader(stream(False), batch_size=_BATCH)
    yield "litdata, shuffled", lambda: litdata.StreamingDataLoader(stream(True), batch_size=_BATCH)
    yield "litdata, shuffled, 2 workers", lambda: litdata.StreamingDataLoader(stream(True), batch_size=_BATCH, num_workers=2)


LIBRARIES = {"datasets": hugging_face, "torchdata": torch_data, "litdata": lit_data}


def load(make: Callable[[], Any], epoch: int, saved: Sequence[Any] = ()) -> TrainingLoader:
    """The training data of ``epoch``, resumed where ``saved`` says."""
    sharding = DataSharding(World(), seed=3)
    torch.manual_seed(3)  # as at the start of a run
    loader = TrainingLoader(make(), sharding, lambda: epoch, *saved)
    loader.flattened = [sharding.shard(each, is_training=True, epoch=lambda: epoch) for each in loader.flattened]
    return loader


def read(loader: TrainingLoader, epoch: int) -> list[tuple[str, Any]]:
    """The batches of ``epoch``, and what a checkpoint after each holds, written and read."""
    loader.epoch = lambda: epoch
    found = []
    for batch, *_ in loader:
        file = io.BytesIO()
        torch.save(loader.stream_records(0), file)
        file.seek(0)
        found.append((str(batch), (loader.newest(0).positions, torch.load(file, weights_only=True))))
    return found


def check(make: Callable[[], Any], positions: int) -> tuple[int, int, int]:
    """How many of some positions of epoch 1 resume bit for bit, of how many, and the batches that are read again at most."""
    undisturbed = load(make, 0)
    read(undisturbed, 0)
    whole = read(undisturbed, 1)
    following = [batch for batch, _ in read(undisturbed, 2)]
    equal, tried, again = 0, 0, 0
    for done in range(1, len(whole), max(1, len(whole) // positions)):
        tried += 1
        saved = whole[done - 1][1]
        record = saved[1][0]
        again = max(again, record["dropped"] + max(dropped for *_, dropped in record["starts"]))
        resumed = load(make, 1, saved)
        rest = [batch for batch, _ in read(resumed, 1)]
        then = [batch for batch, _ in read(resumed, 2)]
        equal += rest == [batch for batch, _ in whole[done:]] and then == following
    return equal, tried, again


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--positions", type=int, default=12, help="of an epoch, after which it is resumed")
    options = parser.parse_args(arguments)
    print("| stream | equal | read again | lockstep says |\n|---|---|---|---|")
    for library in options.libraries:
        rows = LIBRARIES[library]
        if importlib.util.find_spec(library) is None:
            print(f"| {library} | not installed | | |")
            continue
        with tempfile.TemporaryDirectory() as folder:
            for name, make in rows(Path(folder), options.samples):
                said = io.StringIO()
                logging.getLogger("lockstep").addHandler(handler := logging.StreamHandler(said))
                equal, tried, again = check(make, options.positions)
                logging.getLogger("lockstep").removeHandler(handler)
                lines = sorted({line.split(";")[0].removeprefix("data: ") for line in said.getvalue().splitlines()})
                print(f"| {name} | {equal} of {tried} | {again} | {'; '.join(lines)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
