"""Run ``lockstep pack`` with parsed options: pack each folder and print a summary."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from lockstep.core import UsageError, count
from lockstep.data.packed import MANIFEST_FILE
from lockstep.pack.datasets import make_dataset
from lockstep.pack.images import DEFAULT_QUALITY, ImageOptions
from lockstep.pack.packing import Packed, pack
from lockstep.pack.progress import PackingLine
from lockstep.pack.sources import DatasetSource, FolderSource, Source

_SPLITS = ("train", "val", "test")
_MOST_REASONS = 10


def run(options: argparse.Namespace, keys: Sequence[str]) -> None:
    """Pack, and print what is in each folder and what was left out.

    Args:
        options: The flags of the command.
        keys: Arguments of the dataset, as ``--dataset.NAME=VALUE``.

    Raises:
        UsageError: The source cannot be read, or OUT holds something else.
        RunError: The shards cannot be written.
    """
    resizes = options.shorter_side is not None and not options.raw
    images = ImageOptions(options.shorter_side, options.quality or (DEFAULT_QUALITY if resizes else None), options.raw)
    if options.dataset is None:
        sources = dict(_folder_sources(options.src, options.out))
    else:
        dataset, described = make_dataset(options.dataset, keys)
        sources = {options.out: DatasetSource(dataset, described)}
    for folder, source in sources.items():
        with PackingLine(folder) as line:
            packed = pack(source, folder, images, options.shard_size, options.workers, line.show)
        print(_describe(folder, packed))


def _folder_sources(src: Path, out: Path) -> Iterator[tuple[Path, Source]]:
    """The folders to write, and what to write there."""
    folders = {entry.name for entry in src.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    splits = [name for name in _SPLITS if name in folders]
    if not splits or (len(splits) == 1 and len(folders) > 1):  # train may be the name of a class
        yield out, _folder_source(src)
        return
    found = {name: _folder_source(src / name) for name in splits}
    (first, one), *others = found.items()
    for name, source in others:
        if different := sorted(set(source.classes or ()) ^ set(one.classes or ())):
            raise UsageError(
                f"SRC: {src / first} and {src / name} have different classes: {', '.join(different[:5])}"
                f"{' …' if len(different) > 5 else ''} only in one of them."
            )
    for name in sorted(folders - set(splits)):
        print(f"left out {src / name}: neither train, val nor test")
    yield from ((out / name, source) for name, source in found.items())


def _folder_source(folder: Path) -> FolderSource:
    try:
        return FolderSource(folder)
    except UsageError as error:
        raise UsageError(error.message.replace("data.root", "SRC", 1)) from None


def _describe(folder: Path, packed: Packed) -> str:
    """Summary of a folder: its samples and shards, and what was left out, by reason."""
    shards = len(packed.records)
    kept = f"; {count(shards - packed.written, 'shard')} kept, checksums verified" if shards > packed.written else ""
    lines = [f"{folder}: {count(packed.samples, 'sample')} in {count(shards, 'shard')}, {packed.bytes / 1e6:,.1f} MB{kept}"]
    reasons: dict[str, list[str]] = {}
    for name, reason in packed.left_out:
        reasons.setdefault(reason, []).append(name)
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))[:_MOST_REASONS]:
        lines.append(f"  left out {len(names):,}, {reason}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}")
    if packed.left_out:
        lines.append(f"  all {len(packed.left_out):,} that were left out: see {folder / MANIFEST_FILE}")
    return "\n".join(lines)
