"""The command ``lockstep``: train, export, sync and plan; each imports what it needs when it is called."""

import sys
from collections.abc import Sequence
from os import environ

from lockstep.core import LockstepError, UsageError, did_you_mean


def train(arguments: Sequence[str]) -> int:
    """Train as the rank that the environment describes: torchrun, srun, or a single process."""
    from lockstep.trainer.session import main

    return main(arguments, environ)


def export(arguments: Sequence[str]) -> int:
    """Write the weights of a run to one safetensors file."""
    from lockstep.checkpoint.export import main

    return main(arguments)


def sync(arguments: Sequence[str]) -> int:
    """Send W&B the rows of a run that it does not have."""
    from lockstep.monitoring.wandb_sync import main

    return main(arguments)


def plan(arguments: Sequence[str]) -> int:
    """Estimate the memory of each rank; ``launch/slurm.py --plan`` calls this with the resources as JSON."""
    from lockstep.planning.command import main

    return main(arguments)


COMMANDS = {command.__name__: command for command in (train, export, sync, plan)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lockstep COMMAND …`` and return its exit status."""
    name, *rest = sys.argv[1:] if arguments is None else arguments or ["--help"]
    try:
        if name in ("-h", "--help"):
            print("usage: lockstep COMMAND …\n")
            for command in COMMANDS.values():
                print(f"  {command.__name__:8}{(command.__doc__ or '').strip()}")
            return 0
        if name not in COMMANDS:
            raise UsageError(f"{name!r} is not a command{did_you_mean(name, COMMANDS)}")
        return COMMANDS[name](rest)
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
