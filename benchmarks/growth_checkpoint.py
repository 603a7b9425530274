"""What a rank does for a checkpoint, against the number of ranks: one Markdown table.

    python benchmarks/growth_checkpoint.py [--largest 1000000000]

"MB read" is what the process has read from files, from a disk or from memory; where ranks are forked, that of the busiest one.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from growth import Row, print_table

from lockstep.checkpoint import CheckpointWriter, Progress, latest_checkpoint
from lockstep.checkpoint.checksums import PIECE_BYTES, FileSums, share_pieces, verify_pieces
from lockstep.config import CheckpointOptions
from lockstep.core import World
from lockstep.distributed import StopConsensus, destroy_process_group, fork_ranks, init_process_group
from lockstep.runs import Run
from lockstep.strategies import ShardedState
from lockstep.strategies.sharded_state import INDEX_FILE, WEIGHT, join_places, shard_file

_MOST_PARTS = 8  # of 1 GB, that one rank may verify: 64 take minutes
_SMALL_PART = 4 * 10**6
_PARAMETERS = 300


def checkpoint_rows(largest: int) -> Iterator[Row]:
    """What the busiest of all ranks does at a save and at a resume; the parts of 1 GB are sparse files."""
    part = min(10**9, largest)
    for ranks in (1, 8, 64):
        size = f"{ranks} ranks, {part / 1e6:,.0f} MB each"
        with tempfile.TemporaryDirectory() as root:
            files = {f"shard-{rank}.pt": _sparse_file(Path(root, f"shard-{rank}.pt"), part) for rank in range(ranks)}
            busiest = max(share_pieces(files, ranks), key=len)
            yield Row("checkpoint: verify a share, busiest rank", size, partial(verify_pieces, Path(root), busiest))
            if ranks <= _MOST_PARTS:
                everything = share_pieces(files, 1)[0]
                yield Row("checkpoint, one rank for all: verify", size, partial(verify_pieces, Path(root), everything))
    for ranks in (2, 8, 64):
        if ranks * _SMALL_PART <= largest:
            size = f"{ranks} ranks, {_SMALL_PART / 1e6:,.0f} MB each"
            yield Row("checkpoint: save and find, busiest rank", size, partial(_save_and_find, ranks))
    for ranks in (8, 64, 512):
        with tempfile.TemporaryDirectory() as root:
            _write_shards(Path(root), ranks, elements=min(10**6, largest))
            yield Row("checkpoint: read one's own shard", f"{ranks} ranks", partial(_read_own_shard, Path(root), ranks))


def _sparse_file(path: Path, size: int) -> FileSums:
    """Make a file of zeros that takes no space, and return its checksums."""
    with path.open("wb") as file:
        file.truncate(size)
    lengths = [min(PIECE_BYTES, size - start) for start in range(0, size, PIECE_BYTES)]
    digests = {length: hashlib.sha256(bytes(length)).hexdigest() for length in set(lengths)}
    return size, "".join(digests[length] for length in lengths)


def _save_and_find(ranks: int) -> int:
    """Save with forked ranks and search for the checkpoint; return the bytes that the busiest rank has read."""
    with tempfile.TemporaryDirectory() as root:
        run = Run.create(Path(root), "growth")
        run.log(1, 0)
        return max(fork_ranks(partial(_save_and_find_on, run), ranks=ranks))


def _save_and_find_on(run: Run, world: World) -> int:
    init_process_group(world, torch.device("cpu"), timedelta(minutes=10))
    writer = CheckpointWriter(run, world, 1, CheckpointOptions(async_save=False))
    before = _bytes_read()
    part = {f"rank-{world.rank}.pt": torch.zeros(_SMALL_PART, dtype=torch.uint8)}
    writer.save(Progress(1, 0, 1, 0, 0.0, 0.0, 0.0), part, StopConsensus(world))
    if latest_checkpoint(run.checkpoints, world) is None:
        raise RuntimeError(writer.error)
    read = _bytes_read() - before
    destroy_process_group()
    return read


def _write_shards(folder: Path, ranks: int, elements: int) -> None:
    """Write the shards of ``_PARAMETERS`` weights, each divided over all ranks, as stage 3 does."""
    size = -(-elements // _PARAMETERS // ranks)
    shapes = {f"layer.{number}.weight": [size * ranks] for number in range(_PARAMETERS)}
    by_rank = []
    for rank in range(ranks):
        flat = torch.zeros(size * _PARAMETERS)
        torch.save([{WEIGHT: flat, "exp_avg": flat, "exp_avg_sq": flat}], folder / shard_file(rank))
        by_rank.append(torch.tensor([[number, rank * size, size, 0, number * size] for number in range(_PARAMETERS)]).T)
    torch.save({"slices": join_places(by_rank, shapes), "keys": ["exp_avg", "exp_avg_sq"]}, folder / INDEX_FILE)


def _read_own_shard(folder: Path, ranks: int) -> None:
    saved = ShardedState.from_shards(folder)
    assert saved is not None
    for name, parameter in saved.slices.items():
        size = parameter["shape"][0] // ranks
        for key in (WEIGHT, *saved.keys):
            saved.slice(name, key, ranks // 2 * size, size)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def measure_reads(work: Callable[[], int | None]) -> tuple[float, float]:
    """Seconds of ``work``, and MB that it reads; it may return the bytes instead."""
    began, before = time.perf_counter(), _bytes_read()
    read = work()
    return time.perf_counter() - began, (_bytes_read() - before if read is None else read) / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=10**9, help="bytes of the largest part of a rank")
    options = parser.parse_args(arguments)
    print_table("MB read", checkpoint_rows(options.largest), measure_reads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
