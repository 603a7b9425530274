"""The command ``lockstep``: train, export, sync and plan; each imports what it needs when it is called."""

import sys
from collections.abc import Sequence
from importlib import import_module
from os import environ

from lockstep.core import LockstepError, UsageError, did_you_mean

COMMANDS = {
    "train": ("trainer.session", "Train as the rank that the environment describes: torchrun, srun, or a single process."),
    "export": ("checkpoint.export", "Write the weights of a run to one safetensors file."),
    "sync": ("monitoring.wandb_sync", "Send W&B the rows of a run that it does not have."),
    "plan": (
        "planning.command",
        "Estimate the memory of each rank; ``launch/slurm.py --plan`` calls this with the resources as JSON.",
    ),
}
"""Module whose ``main`` runs the command, and its help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lockstep COMMAND …`` and return its exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print("usage: lockstep COMMAND …\n")
            for command, (_, description) in COMMANDS.items():
                print(f"  {command:8}{description}")
            return 0
        if name not in COMMANDS:
            raise UsageError(f"{name!r} is not a command{did_you_mean(name, COMMANDS)}")
        program = import_module(f"lockstep.{COMMANDS[name][0]}")
        return int(program.main(rest, environ) if name == "train" else program.main(rest))
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
