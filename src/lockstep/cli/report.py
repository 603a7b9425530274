"""Draw the report of a run, which may still train.

It writes report.png and report.html: all metrics over the steps, restarts, test scores, predictions, where the time went, and
the config. The page is one file, which a browser opens without a network.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lockstep.core import CommandLineParser, UsageError
from lockstep.runs import Run
from lockstep.runs.report import write_report


def main(arguments: Sequence[str]) -> int:
    """Draw the report of the run in ``arguments``, print the paths of its files, and return 0.

    Raises:
        UsageError: It is not a run folder, or the report cannot be written.
    """
    parser = CommandLineParser(
        prog="lockstep report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/digits/<id>")
    parser.add_argument("--folder", type=Path, help="where to write (default: the run folder)")
    options = parser.parse_args(arguments)
    run = Run.open(options.run)
    folder = options.folder or run.folder
    if not folder.is_dir():
        raise UsageError(f"--folder: {folder} is not a folder; make it first.")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--folder: {folder} cannot be written; choose another folder.")
    for path in write_report(run, folder):
        print(path)
    return 0
