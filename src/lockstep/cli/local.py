"""Train on this machine: in this process, where ``breakpoint()`` works, or as several ranks.

    {program}                        # the shipped config digits, one process
    {program} --ranks 2              # two ranks: gloo on CPUs, NCCL on GPUs
    {program} --nodes 2 --ranks 2    # two simulated nodes of two ranks each
    {program} --config mine.yaml --trainer.max_epochs 3 --model.lr 0.01

All other arguments go to the trainer: an optional command (fit, validate, test, predict), then keys of the config.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lockstep.cli.help import LaunchParser
from lockstep.cli.hints import check_misplaced
from lockstep.config import check_nvme_path, check_ranks, check_run_root, check_start, split_command, with_config
from lockstep.config.validation import shows_only, validate_arguments
from lockstep.core import LockstepError, UsageError, fast_imports, int_at_least, python_path, use_writable_caches
from lockstep.runs import LaunchRecord, Run, nothing_left


def make_parser(program: str) -> argparse.ArgumentParser:
    """Build the parser of the launcher's own flags."""
    parser = LaunchParser(program, __doc__)
    resources, run = parser.add_argument_group("resources"), parser.add_argument_group("run")
    resources.add_argument(
        "--nodes", type=int_at_least(1), help="simulated nodes (default 1; with --resume, as the run was started)"
    )
    resources.add_argument(
        "--ranks", type=int_at_least(1), help="ranks on each node (default 1; with --resume, as the run was started)"
    )
    run.add_argument("--resume", type=Path, metavar="RUN", help="resume the run in this folder, with its own config")
    return parser


def main(arguments: Sequence[str], program: str = "lockstep local") -> int:
    """Parse ``arguments``, train and return the exit status: 0, 1 (failed), 2 (usage), 130, 138, 140, 143 (signal)."""
    parser = make_parser(program)
    try:
        options, rest = parser.parse_known_args(arguments)
        resume = Run.open(options.resume) if options.resume else None
        rest = with_config(rest, str(resume.config) if resume is not None else None)
        flags = [*vars(options), "help"]
        try:
            config = validate_arguments(rest, flags, [Path.cwd(), *python_path(os.environ)])
        except UsageError:
            from lockstep.cli import submit  # imports submitit, which a local run does not need

            check_misplaced(rest, flags, submit.make_parser)
            raise
        launched = LaunchRecord.read(resume.launch) if resume is not None else None
        nodes = options.nodes or (launched.max_nodes if launched is not None else 1)
        ranks = options.ranks or (launched.ranks_per_node if launched is not None else 1)
        if not any(map(shows_only, rest)):
            check_ranks(nodes, ranks, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
            command, _ = split_command(rest)
            if resume is not None and command == "fit" and (why := nothing_left(resume, config)):
                print(f"lockstep: {why}", file=sys.stderr)
                return 0
            check_start(command, config, [nodes * ranks], os.environ)
            check_nvme_path(config)
            if resume is None:
                root, name = Path(config["run"]["root"]).absolute(), str(config["run"]["name"])
                Run.check_place(root, name)
                check_run_root(root, name)
        # In a shell inside a Slurm allocation, this run is not one of its tasks. It also starts its own W&B service: that of
        # the program that started it would keep the W&B run of a killed rank in use.
        for name in [name for name in os.environ if name.startswith(("SLURM_", "WANDB_SERVICE")) and name != "SLURM_CONF"]:
            del os.environ[name]
        if warning := use_writable_caches(os.environ):
            print(f"lockstep: {warning}", file=sys.stderr)
        with fast_imports():  # only now: torch and Lightning take seconds, which a usage error should not cost
            from lockstep.trainer.local import run_locally

        return run_locally(rest, nodes, ranks, program.split(), arguments, resume)
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
