"""What grows with ranks, samples, files and runs: one Markdown table, by simulation where the machine is too small.

    python benchmarks/growth.py [--groups order index …] [--largest 1000000000]

Each row runs in a fork of its own. MB is the memory that the work adds to its process, at its peak, without what it shares with
others. Rows named "usual way" do what a DistributedSampler and torchvision's ImageFolder do.
"""

import argparse
import hashlib
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchcodec.decoders import decode_image

from lockstep.core import World, atomic_write_json
from lockstep.data.decode import center_crop
from lockstep.data.encoded import Decoder
from lockstep.data.file_index import FileIndex, index_content, publish_index, scan
from lockstep.data.image_folder import ImageFiles
from lockstep.data.loading import DataSharding
from lockstep.data.loading.sampling import DataPosition, GlobalBatchSampler
from lockstep.monitoring.csv_logger import METRICS_ROW, CsvMetricsLogger
from lockstep.monitoring.watchdog import Watchdog
from lockstep.runs import Run
from lockstep.runs.snapshot import take_snapshot, verify_snapshot
from lockstep.slurm import SubmittedJob, register_job, registered_jobs
from lockstep.trainer.prediction_parts import Part, PartWriter, merge_parts

_MOST = 10**7  # samples that the usual ways may hold: 1e8 take a minute and 4 GB
_MOST_FILES = 10**5  # files that are made on disk
_BATCH = 256
_DECODED = 100
_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of an epoch


@dataclass(frozen=True)
class Row:
    """One line of a table: what is done, at which size, and a function that does it."""

    what: str
    size: str
    work: Callable[[], Any]


def order_rows(largest: int) -> Iterator[Row]:
    """Rank 3 of 64 resumes in the middle of epoch 7: its first batch, then 1,000 batches."""
    for samples in _sizes(10**6, largest):
        size = f"{samples:.0e} samples"
        yield Row("order: first batch after a resume", size, partial(_read_batches, samples, 1))
        yield Row("order: 1,000 batches", size, partial(_read_batches, samples, 1000))
        if samples <= _MOST:
            yield Row("order, usual way: first batch", size, partial(_draw_order, samples))


def _read_batches(samples: int, number: int) -> None:
    batches = BatchSampler(RandomSampler(range(samples)), _BATCH, drop_last=True)
    sampler = GlobalBatchSampler(batches, World(3, 64, 3, 64), 0, is_training=True, epoch=lambda: 7)
    with sampler.starting_at(DataPosition(7, used=samples // 2 // _BATCH * _BATCH)):
        resumed = iter(sampler)
    for _ in range(number):
        next(resumed)


def _draw_order(samples: int) -> list[int]:
    order: list[int] = torch.randperm(samples).tolist()
    return order


def index_rows(largest: int) -> Iterator[Row]:
    """The files of an image folder: one walk per run, then what each rank and each of its workers holds."""
    for files in _sizes(10**4, min(largest, 10**6)):
        size = f"{files:.0e} files"
        names = [f"n{number % 1000:08d}/n{number % 1000:08d}_{number:08d}.JPEG" for number in range(files)]
        with tempfile.TemporaryDirectory() as root:
            folder, path = Path(root, "train"), Path(root, "run", "train.index")
            if files <= _MOST_FILES:
                _make_files(folder, names)
                yield Row("image index: walk, once per run", size, partial(scan, folder))
            publish_index(index_content([(name, 0) for name in sorted(names)], ["n0"], folder, {}), path, replace=True)
            yield Row("image index: open, on each rank", size, partial(FileIndex.open, path))
            index, paths = FileIndex.open(path), [(os.path.join(folder, name), 0) for name in names]
            yield Row("image index: all names, in each worker", size, partial(_touch, index))
            yield Row("image index, usual way: all names, in each worker", size, partial(_touch, paths))


def _touch(files: FileIndex | list[tuple[str, int]]) -> None:
    for number in range(len(files)):
        _name, _label = files[number]


def _make_files(folder: Path, names: Sequence[str]) -> None:
    for inner in sorted({name.rpartition("/")[0] for name in names}):
        (folder / inner).mkdir(parents=True)
    for name in names:
        (folder / name).touch()


def _sizes(least: int, largest: int) -> Iterator[int]:
    size = least
    while size <= largest:
        yield size
        size *= 10


def prediction_rows(largest: int) -> Iterator[Row]:
    """Rank zero merges rows of 1 kB from four ranks."""
    for samples in _sizes(10**4, min(largest, 10**5)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for rank in range(4):
                part = PartWriter(folder / "parts", rank)
                part.append(range(rank, samples, 4), {"x": torch.zeros(samples // 4, 250)})
                part.close()
            yield Row("predict: merge rows of 1 kB", f"{samples:.0e} samples", partial(_merge, folder))


def _merge(folder: Path) -> None:
    merge_parts([Part.open(folder / "parts", rank) for rank in range(4)], folder / "merged.safetensors")


def job_rows(largest: int) -> Iterator[Row]:
    """``lockstep jobs list`` finds its 20 jobs, and all, among those that were ever submitted."""
    for jobs in _sizes(10**2, min(largest, 10**4)):
        with tempfile.TemporaryDirectory() as home:
            for number in range(jobs):
                register_job(SubmittedJob(str(number), Path(home), "run", 1, ""), {"HOME": home})
            for what, newest in (("newest 20", 20), ("all", None)):
                find = partial(registered_jobs, {"HOME": home}, newest)
                yield Row(f"lockstep jobs list: {what}", f"{jobs:.0e} jobs ever", find)


def snapshot_rows(largest: int) -> Iterator[Row]:
    """The code of a run is copied at its submission, and each node verifies the copy."""
    for files in _sizes(10**2, min(largest, 10**4)):
        with tempfile.TemporaryDirectory() as name:
            project, run, again, caches = (Path(name, part) for part in ("project", "run", "again", "caches"))
            _make_files(project, [f"part{number % 100}/module{number}.py" for number in range(files)])
            time.sleep(2)  # a file that is new may still change unnoticed, and is not linked
            yield Row("snapshot: take", f"{files:.0e} files", partial(take_snapshot, project, run, (), (), caches))
            again.mkdir()
            yield Row("snapshot: take another", f"{files:.0e} files", partial(take_snapshot, project, again, (), (), caches))
            yield Row("snapshot: verify, on each node", f"{files:.0e} files", partial(_verify, run))


def _verify(run: Path) -> None:
    verify_snapshot(run, hashlib.sha256((run / "code.sha256").read_bytes()).hexdigest())


def metrics_rows(largest: int) -> Iterator[Row]:
    """A run resumes after the rows that it has logged, which only rank zero reads."""
    for rows in _sizes(10**3, min(largest, 10**5)):
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, "metrics.csv")
            path.write_text(f"{METRICS_ROW},step,epoch,train/loss\n" + "".join(f"{n},{n},0,0.5\n" for n in range(1, rows + 1)))
            for what, is_writer in (("rank zero", True), ("any other rank", False)):
                yield Row(f"resume metrics.csv: {what}", f"{rows:.0e} rows", partial(_resume_metrics, path, rows, is_writer))


def _resume_metrics(path: Path, rows: int, is_writer: bool) -> None:
    CsvMetricsLogger(path, lambda: 0, is_writer=is_writer).resume(rows)


def hang_rows(largest: int) -> Iterator[Row]:
    """All ranks hang, and one of them reads the reports of all."""
    for ranks in _sizes(8, min(largest, 8000)):
        with tempfile.TemporaryDirectory() as name:
            run = Run.create(Path(name), "growth")
            run.attempt_folder(1).mkdir()
            for rank in range(ranks):
                atomic_write_json(run.attempt_folder(1) / f"stuck-{rank}.json", {"rank": rank, "heartbeats": 9})
            for what, rank in (("rank zero", 0), ("any other rank", 1)):
                watchdog = Watchdog(run, World(rank, ranks), 1, 300.0)
                yield Row(f"hang report: {what}", f"{ranks:,} ranks", partial(watchdog.record_stuck, 300.0))


GROUPS = {
    "order": order_rows,
    "index": index_rows,
    "predict": prediction_rows,
    "jobs": job_rows,
    "snapshot": snapshot_rows,
    "metrics": metrics_rows,
    "hang": hang_rows,
}


class OneImage(ImageFiles):
    """The files of an index, all of which are one small image on the disk; it is decoded for some of them, to save time."""

    def __init__(self, folder: Path, index: FileIndex, image: Path) -> None:
        super().__init__(folder, index, Decoder(center_crop, 8), deterministic=True)
        self.image, self.blank = str(image), torch.zeros(3, 8, 8, dtype=torch.uint8)

    def place(self, index: int) -> str:
        return self.image

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index) if index % _DECODED == 0 else (self.blank, int(self.index.labels[index]))


class OneImageOfList(Dataset[Any]):
    """Likewise, with a list of names and labels, as torchvision keeps them."""

    def __init__(self, names: list[tuple[str, int]], image: Path) -> None:
        self.names, self.image = names, str(image)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        _name, label = self.names[index]
        return decode_image(self.image) if index % _DECODED == 0 else torch.zeros(3, 8, 8, dtype=torch.uint8), label


def print_workers(files: int, workers: int) -> None:
    """Print the memory that the workers of a loader have for themselves, all of them together, during an epoch."""
    print(f"\n| loader | size | images/s | {' | '.join(f'MB after {share:.0%}' for share in _SHARES)} |")
    print(f"|---|---|---|{'---|' * len(_SHARES)}")
    with tempfile.TemporaryDirectory() as name:
        folder, image = Path(name, "train"), Path(name, "image.jpg")
        names = [(f"n{number % 1000:08d}/n{number % 1000:08d}_{number:08d}.JPEG", number % 1000) for number in range(files)]
        image.write_bytes(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)))
        folder.mkdir()
        classes = sorted({name.partition("/")[0] for name, _ in names})
        publish_index(index_content(sorted(names), classes, folder, {}), Path(name, "index"), replace=True)
        for what, dataset in (
            ("lockstep, image folder", OneImage(folder, FileIndex.open(Path(name, "index")), image)),
            ("usual way, a list of names", OneImageOfList(names, image)),
        ):
            plain: Any = DataLoader(dataset, batch_size=4 * _BATCH, shuffle=True, num_workers=workers)
            loader = DataSharding(World(), 0).shard(plain) if isinstance(dataset, OneImage) else plain
            marks = [max(1, int(share * len(loader))) for share in _SHARES]
            began, found = time.perf_counter(), []
            for number, _ in enumerate(loader, start=1):
                if number in marks:
                    found += [_children_memory()] * marks.count(number)
            speed = files / (time.perf_counter() - began)
            memory = " | ".join(f"{1024 * kilobytes / 1e6:,.0f}" for kilobytes in found)
            print(f"| {what} | {files:.0e} files, {workers} workers | {speed:,.0f} | {memory} |", flush=True)


def _children_memory() -> int:
    """KiB that the children of this process have for themselves."""
    text = Path("/proc/self/task", str(os.getpid()), "children").read_text()
    return sum(_kilobytes("smaps_rollup", "Private_Dirty", number) for number in text.split())


def measure_memory(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds and MB of ``work``, at its peak."""
    before, peak, is_done = _memory(), [0], threading.Event()

    def sample() -> None:
        while not is_done.wait(0.01):
            peak[0] = max(peak[0], _kilobytes("status", "RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.perf_counter()
    result = work()  # which lives until its memory is counted
    seconds = time.perf_counter() - began
    is_done.set()
    sampler.join()
    after = _memory()
    grown = max(*peak, after[0]) - before[0], after[1] - before[1]
    del result
    return seconds, max(grown) * 1024 / 1e6


def print_table(unit: str, rows: Iterable[Row], measure: Callable[[Callable[[], Any]], tuple[float, float]]) -> None:
    """Print a Markdown table of seconds and what else ``measure`` finds, in this unit; each row in a fork of this process."""

    def send(row: Row, pipe: Connection) -> None:
        pipe.send(measure(row.work))

    print(f"| what | size | ms | {unit} |\n|---|---|---|---|")
    for row in rows:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=send, args=(row, sender))
        process.start()
        sender.close()
        seconds, amount = receiver.recv()
        process.join()
        print(f"| {row.what} | {row.size} | {seconds * 1e3:,.1f} | {amount:,.1f} |", flush=True)


def _memory() -> tuple[int, int]:
    """Memory that is not of files, and what is written to and not shared, in KiB."""
    return _kilobytes("status", "RssAnon"), _kilobytes("smaps_rollup", "Private_Dirty")


def _kilobytes(file: str, field: str, process: str = "self") -> int:
    lines = Path("/proc", process, file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=[*GROUPS, "workers"], default=[*GROUPS, "workers"])
    parser.add_argument("--workers", type=int, default=8, help="of a loader over at most a million files")
    parser.add_argument("--largest", type=int, default=10**9, help="samples and files of the largest rows")
    options = parser.parse_args(arguments)
    groups = [group for group in options.groups if group in GROUPS]
    print_table("MB", (row for group in groups for row in GROUPS[group](options.largest)), measure_memory)
    if "workers" in options.groups:
        print_workers(min(options.largest, 10**6), options.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
