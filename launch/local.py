#!/usr/bin/env python
"""Train on this machine: in this process, where ``breakpoint()`` works, or as several ranks.

    python launch/local.py                        # configs/digits.yaml, one process
    python launch/local.py --ranks 2              # two ranks: gloo on CPUs, nccl on GPUs
    python launch/local.py --nodes 2 --ranks 2    # two simulated nodes of two ranks each
    python launch/local.py --config mine.yaml --trainer.max_epochs 3 --model.lr 0.01

All other arguments go to the trainer: an optional command (fit, validate, test, predict), then keys of the config.
--print_config shows all keys.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lockstep.config import check_checkpoint_path, check_deepspeed, check_nvme_path, check_wandb_key
from lockstep.config.validation import shows_only, validate_arguments
from lockstep.core import CommandLineParser, LockstepError, int_at_least, python_path
from lockstep.runs import Run

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits.yaml"


def main(arguments: Sequence[str]) -> int:
    """Parse ``arguments``, train and return the exit status: 0, 1 (failed), 2 (usage), 130, 138, 140, 143 (signal)."""
    parser = CommandLineParser(
        prog="launch/local.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--nodes", type=int_at_least(1), help="simulated nodes (default 1; with --resume, as in the last attempt)"
    )
    parser.add_argument(
        "--ranks", type=int_at_least(1), help="ranks on each node (default 1; with --resume, as in the last attempt)"
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="resume the run in this folder, with its own config")
    try:
        options, rest = parser.parse_known_args(arguments)
        at = 1 if rest and not rest[0].startswith("-") else 0
        resume = Run.open(options.resume) if options.resume else None
        if resume is not None:
            rest[at:at] = ["--config", str(resume.config)]
        elif not any(argument == "--config" or argument.startswith("--config=") for argument in rest):
            rest[at:at] = ["--config", str(DEFAULT_CONFIG)]
        flags = [*vars(options), "help"]
        config = validate_arguments(rest, flags, [Path.cwd(), *python_path(os.environ)])
        if not any(map(shows_only, rest)):
            check_checkpoint_path(rest[0] if at else "fit", config["ckpt_path"], {})
            check_deepspeed(config)
            check_nvme_path(config)
            check_wandb_key(config, os.environ)
        # In a shell inside a Slurm allocation, this run is not one of its tasks. Nor does it use the W&B service of the program
        # that started it, which would keep the run of a killed rank in use.
        for name in [name for name in os.environ if name.startswith(("SLURM_", "WANDB_SERVICE")) and name != "SLURM_CONF"]:
            del os.environ[name]
        # Imported only now: torch and Lightning take seconds, which a usage error should not cost.
        from lockstep.trainer.local import run_locally

        return run_locally(rest, options.nodes, options.ranks, ["python", "launch/local.py", *arguments], resume)
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
