"""Pack images into a few large files, which a shared file system reads faster than many small ones.

SRC is a folder of class folders, or of train/, val/ and test/ with class folders. The command writes shards, tar
files in the WebDataset convention, and their index to OUT; train on it with the DataModule lockstep.data.Shards. A second
call checks the existing shards and writes the missing ones, with the same bytes.

{program} /data/pets /data/pets-256 --shorter-side 256
{program} data/cifar --dataset torchvision.datasets.CIFAR10 --dataset.root data
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lockstep.core import CommandLineParser, UsageError, int_at_least


def main(arguments: Sequence[str], program: str = "lockstep pack") -> int:
    """Run ``lockstep pack`` and return its exit status.

    Raises:
        UsageError: An argument is wrong, or OUT holds something else.
        RunError: The shards cannot be written.
    """
    parser = make_parser(program)
    own, keys = _split_off_keys(arguments)
    options = parser.parse_args(own)
    _check(options, keys)
    from lockstep.pack.run import run  # imports torch; report mistakes first

    try:
        run(options, keys)
    except KeyboardInterrupt:
        print("\nlockstep: interrupted; run the command again: finished shards are kept.", file=sys.stderr)
        return 130
    return 0


def make_parser(program: str) -> CommandLineParser:
    """The parser of all flags except ``--dataset.*``."""
    parser = CommandLineParser(
        prog=program,
        description=(__doc__ or "").format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("src", nargs="?", type=Path, metavar="SRC", help="folder of images")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; is created")
    parser.add_argument("--dataset", metavar="CLASS", help="map-style dataset instead of SRC; --dataset.ARG: its arguments")
    size = parser.add_argument_group("images")
    size.add_argument("--shorter-side", type=int_at_least(1), metavar="N", help="resize larger images to this shorter side")
    size.add_argument("--quality", type=int_at_least(1), metavar="Q", help="JPEG quality, 1 to 100 (default: 90, if resized)")
    size.add_argument("--raw", action="store_true", help="store pixels, which need no decoding but much more space")
    more = parser.add_argument_group("shards")
    more.add_argument("--shard-size", type=int_at_least(1), default=4096, metavar="N", help="samples per shard (default: 4096)")
    cpus = len(os.sched_getaffinity(0))
    more.add_argument("--workers", type=int_at_least(0), default=cpus, metavar="N", help="processes (default: the CPUs)")
    return parser


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


def _check(options: argparse.Namespace, keys: Sequence[str]) -> None:
    """Raise UsageError if arguments contradict each other or do not fit the folders."""
    if options.quality is not None and options.quality > 100:
        raise UsageError(f"--quality: {options.quality} must be 100 or less.")
    if options.raw and options.quality is not None:
        raise UsageError("--raw: stores pixels, which have no --quality; give one of them.")
    if (options.src is None) == (options.dataset is None):
        raise UsageError("SRC: give either a folder of images or --dataset CLASS.")
    if options.dataset is None and keys:
        raise UsageError(f"{keys[0].partition('=')[0]}: belongs to --dataset, which is not given.")
    if options.src is not None and not options.src.is_dir():
        raise UsageError(f"SRC: {options.src} is not a folder.")
    if options.src is not None and options.out.resolve().is_relative_to(options.src.resolve()):
        raise UsageError(f"OUT: {options.out} is in SRC; choose a folder elsewhere.")
