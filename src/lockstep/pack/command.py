"""Pack images into a few large files, which a shared file system reads faster than many small ones.

SRC is a folder of class folders, or of train/, val/ and test/ with class folders. OUT gets shards, tar files in the WebDataset
convention, and their index; train on it with the DataModule lockstep.data.Shards. When it is called again, it checks the
shards that are there and writes those that are missing, with the same bytes.

{program} /data/pets /data/pets-256 --shorter-side 256
{program} data/cifar --dataset torchvision.datasets.CIFAR10 --dataset.root data
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lockstep.core import CommandLineParser, UsageError, count, int_at_least
from lockstep.pack.datasets import make_dataset
from lockstep.pack.images import DEFAULT_QUALITY, ImageOptions
from lockstep.pack.packing import Packed, pack
from lockstep.pack.progress import PackingLine
from lockstep.pack.sources import DatasetSource, FolderSource, Source

_SPLITS = ("train", "val", "test")


def main(arguments: Sequence[str], program: str = "lockstep pack") -> int:
    """Pack what ``arguments`` say, say what was packed and what was left out, and return 0.

    Raises:
        UsageError: An argument is wrong, or OUT holds something else.
        RunError: The shards cannot be written.
    """
    parser = make_parser(program)
    own, keys = _split_off_keys(arguments)
    options = parser.parse_args(own)
    images = _image_options(options)
    if (options.src is None) == (options.dataset is None):
        raise UsageError("SRC: give a folder of images, or --dataset CLASS; one of them.")
    if options.src is None:
        dataset, described = make_dataset(options.dataset, keys)
        sources: dict[Path, Source] = {options.out: DatasetSource(dataset, described)}
    else:
        if keys:
            raise UsageError(f"{keys[0].partition('=')[0]}: belongs to --dataset, which is not given.")
        sources = dict(_folder_sources(options.src, options.out))
    try:
        for folder, source in sources.items():
            with PackingLine(folder) as line:
                packed = pack(source, folder, images, options.shard_size, options.workers, line.show)
            print(_describe(folder, packed))
    except KeyboardInterrupt:
        print("\nlockstep: interrupted; call again, and finished shards are kept.", file=sys.stderr)
        return 130
    return 0


def make_parser(program: str) -> CommandLineParser:
    """The parser of the flags, but for ``--dataset.*``."""
    parser = CommandLineParser(
        prog=program,
        description=(__doc__ or "").format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("src", nargs="?", type=Path, metavar="SRC", help="folder of images")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, which is made")
    parser.add_argument("--dataset", metavar="CLASS", help="map-style dataset instead of SRC; --dataset.ARG: its arguments")
    size = parser.add_argument_group("images")
    size.add_argument("--shorter-side", type=int_at_least(1), metavar="N", help="resize the shorter side of larger ones")
    size.add_argument("--quality", type=int_at_least(1), metavar="Q", help="of JPEG, 1 to 100 (default: 90, if resized)")
    size.add_argument("--raw", action="store_true", help="store pixels, which need no decoding, and much more space")
    more = parser.add_argument_group("shards")
    more.add_argument(
        "--shard-size", type=int_at_least(1), default=4096, metavar="N", help="samples of a shard (default: 4096)"
    )
    more.add_argument("--workers", type=int_at_least(0), default=_cpus(), metavar="N", help="processes (default: the CPUs)")
    return parser


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _split_off_keys(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of the parser, and those of the dataset as ``--dataset.NAME=VALUE``."""
    own, keys, rest = list[str](), list[str](), iter(arguments)
    for argument in rest:
        if not argument.startswith("--dataset."):
            own.append(argument)
        elif "=" in argument or (value := next(rest, None)) is None:
            keys.append(argument)
        else:
            keys.append(f"{argument}={value}")
    return own, keys


def _image_options(options: argparse.Namespace) -> ImageOptions:
    if options.quality is not None and options.quality > 100:
        raise UsageError(f"--quality: {options.quality} must be 100 or less.")
    if options.raw and options.quality is not None:
        raise UsageError("--raw: stores pixels, which have no --quality; give one of them.")
    resizes = options.shorter_side is not None and not options.raw
    return ImageOptions(options.shorter_side, options.quality or (DEFAULT_QUALITY if resizes else None), options.raw)


def _folder_sources(src: Path, out: Path) -> Iterator[tuple[Path, Source]]:
    """The folders to write, and what to write there."""
    if not src.is_dir():
        raise UsageError(f"SRC: {src} is not a folder.")
    if out.resolve().is_relative_to(src.resolve()):
        raise UsageError(f"OUT: {out} is in SRC; choose a folder elsewhere.")
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
    """What is in a folder, and what was left out, by reason."""
    whole = (
        f"{folder}: {count(packed.samples, 'sample')} in {count(len(packed.records), 'shard')}, {packed.bytes / 1e6:,.1f} MB"
    )
    kept = len(packed.records) - packed.written
    lines = [whole + (f"; {count(kept, 'shard')} kept, whose checksums are right" if kept else "")]
    for reason, number in Counter(reason for _, reason in packed.left_out).most_common():
        names = [name for name, why in packed.left_out if why == reason]
        shown = f"{', '.join(names[:3])}{', …' if number > 3 else ''}"
        lines.append(f"  left out {number:,}, {reason}: {shown}")
    return "\n".join(lines)
