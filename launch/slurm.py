#!/usr/bin/env python
"""Submit a run to Slurm: every rank a task, through submitit. Prints the job's id; jobs.py tells what becomes of it.

    python launch/slurm.py --nodes 4                                          # configs/digits.yaml on four nodes
    python launch/slurm.py --nodes 4 --profile a100 --time 24:00:00 --config configs/imagenet.yaml
    python launch/slurm.py --nodes 4 --dry-run                                # everything but sbatch
    python launch/slurm.py --nodes 4 --profile a100 --plan                    # which strategy fits the GPUs' memory
    python launch/slurm.py --sweep model.lr=0.1,0.03 --sweep seed_everything=1,2      # four runs, one job array

Whatever is not listed below goes to the trainer untouched: an optional command (fit, validate, test, predict), then keys of
the config. What a profile says of the cluster (--profile, or LOCKSTEP_PROFILE) can be said with a flag too, and the flag wins.
"""

import argparse
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from lockstep.config import parse_sweep
from lockstep.config.validation import shows_only
from lockstep.core import CommandLineParser, LockstepError, UsageError
from lockstep.runs import Run
from lockstep.slurm import check_slurm_conf, follow
from lockstep.slurm.submission import (
    PROFILE_FLAGS,
    NodeRange,
    Profile,
    Submission,
    apply_flags,
    load_profile,
    plan_memory,
    profile_folders,
    resolve_config,
    scrub_environment,
)

TOOLKIT = Path(__file__).resolve().parent.parent


def make_parser() -> argparse.ArgumentParser:
    """The launcher's own flags: resources, and what to do with the job."""
    parser = CommandLineParser(
        prog="launch/slurm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--nodes", type=NodeRange.parse, default=NodeRange(1, 1), metavar="N[-M]", help="nodes, or a range (default 1)"
    )
    parser.add_argument("--profile", metavar="NAME", help="configs/cluster/NAME.yaml, one of your own, or a file")
    helps = {f.name: f.metadata["help"] for f in fields(Profile)}
    numbers = {f.name for f in fields(Profile) if f.type in (int, int | None)}
    for name in PROFILE_FLAGS:
        kind = int if name in numbers else str
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=helps[name])
    parser.add_argument("--exclusive", action="store_true", default=None, help=helps["exclusive"])
    for name in ("sbatch", "srun"):
        parser.add_argument(f"--{name}", action="append", metavar="=ARGUMENT", help=helps[name])
    parser.add_argument("--job-name", help="name of the job (default: run.name)")
    parser.add_argument("--after", metavar="JOB", help="start when that job has ended well")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B,…", help="one run for each value; may be repeated"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run in this folder, on its own code and config"
    )
    parser.add_argument("--array-parallelism", type=int, default=256, help="runs of a sweep at the same time (default 256)")
    parser.add_argument("--no-snapshot", action="store_true", help="run the code as it will be when the job starts")
    parser.add_argument("--check", action="store_true", help="check everything, also with torch; queue nothing")
    parser.add_argument("--dry-run", action="store_true", help="as --check, and print the script and the complete config")
    parser.add_argument(
        "--plan", action="store_true", help="show what the model needs on each rank, and what fits; queue nothing"
    )
    parser.add_argument("--follow", action="store_true", help="show rank zero's log until the end; exit with the run's status")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Submit what ``arguments`` say and return the exit status: 0, 2 (usage), with --follow the run's (see jobs.py)."""
    parser = make_parser()
    try:
        own, rest = parser.parse_known_args(arguments)
        check_slurm_conf(os.environ)
        resume = Run.open(own.resume) if own.resume else None
    except UsageError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
    if resume is not None:
        rest[:0] = ["--config", str(resume.config)]
    elif not any(argument == "--config" or argument.startswith("--config=") for argument in rest):
        at = 1 if rest and not rest[0].startswith("-") else 0
        rest[at:at] = ["--config", str(TOOLKIT / "configs" / "digits.yaml")]
    here = Path.cwd()
    if any(shows_only(argument) for argument in rest):
        return subprocess.run([sys.executable, "-m", "lockstep.cli", "train", *rest]).returncode
    try:
        if ignored := [name for name in scrub_environment(os.environ) if name.startswith("SBATCH_")]:
            print(f"ignored: {', '.join(ignored)}; put them into a profile.", file=sys.stderr)
        profile = load_profile(own.profile, os.environ, profile_folders(os.environ, here, TOOLKIT))
        flags = {name: getattr(own, name) for name in (*PROFILE_FLAGS, "exclusive", "sbatch", "srun")}
        submission = Submission.create(
            rest,
            apply_flags(profile, flags),
            own.nodes,
            here,
            job_name=own.job_name,
            after=own.after,
            sweep=parse_sweep(own.sweep),
            array_parallelism=own.array_parallelism,
            snapshot=not own.no_snapshot,
            resume=resume,
            typed=["python", "launch/slurm.py", *arguments],
            flags=[name[2:] for action in parser._actions for name in action.option_strings],
            env=os.environ,
        )
        if own.plan:
            table, unknown = plan_memory(submission, os.environ)
            if own.sweep:
                print("This is the first run of the sweep.")
            print(unknown, file=sys.stderr, end="")
            print(table, end="")
            return 0
        has_slurm = shutil.which("sbatch") is not None
        if has_slurm or not own.dry_run:
            submission.check_with_slurm(os.environ)
        if own.dry_run or own.check:
            config = resolve_config(submission, os.environ)
            if own.dry_run:
                print(submission.preview(os.environ), config, sep="\n", end="")
            if not has_slurm:
                print("Slurm is not installed here: it was not asked whether it would take the job.", file=sys.stderr)
            return 0
        queued = submission.submit(os.environ)
        print(queued.job, flush=True)
        print(f"run folder {queued.folder}", file=sys.stderr)
        return follow(queued, os.environ) if own.follow else 0
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    gc.freeze()  # the process ends: to look for garbage once more would take a tenth of its time
    sys.exit(exit_status)
