"""The command ``lockstep``, and the functions of ``import lockstep``; both import what they need when they are called."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from lockstep import __version__
from lockstep.core import LockstepError, UsageError, did_you_mean, fast_imports

COMMANDS = {
    "local": ("cli.local", "Train on this machine: in this process, or as several ranks."),
    "submit": ("cli.submit", "Submit a run, or a sweep, to Slurm."),
    "jobs": ("cli.jobs", "Show, follow and cancel jobs."),
    "plan": ("cli.plan", "Estimate the memory of each rank, and which strategies fit."),
    "train": ("trainer.session", "Train as the rank that the environment describes: torchrun, srun, or a single process."),
    "pack": ("pack.command", "Pack folders of images, or a dataset, into shards, which are faster to read."),
    "report": ("cli.report", "Draw a run: its metrics, restarts and results, as a picture and a page for a browser."),
    "export": ("checkpoint.export", "Write the weights of a run to one safetensors file."),
    "sync": ("monitoring.wandb_sync", "Send W&B the rows of a run that it does not have."),
    "completion": ("cli.completion", "Print a script that completes commands, keys and values in bash or zsh."),
    "cluster": ("cli.cluster", "Start and stop a Slurm cluster on this machine."),
}
"""Module whose ``main`` runs the command, and its help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lockstep COMMAND …`` and return its exit status; 130 after Ctrl-C."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print("usage: lockstep COMMAND …\n")
            for command, (_, description) in COMMANDS.items():
                print(f"  {command:12}{description}")
            print("\nlockstep COMMAND --help explains each; lockstep --version.")
            return 0
        if name == "--version":
            print(f"lockstep {__version__}")
            return 0
        if name not in COMMANDS:
            raise UsageError(f"{name!r} is not a command{did_you_mean(name, COMMANDS)}")
        return _load(name)(rest)
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


def run_script(name: str, program: str) -> NoReturn:
    """Run the command ``name`` as the script ``program`` with the arguments of this process, and exit with its status."""
    status = _load(name)(sys.argv[1:], program)
    if name == "submit":  # nothing is left to clean up, which would take a twentieth of the time
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _load(name: str) -> Callable[..., int]:
    """Import the ``main`` of a command."""
    with fast_imports():
        main: Callable[..., int] = import_module(f"lockstep.{COMMANDS[name][0]}").main
    return main
