"""What fits? ``launch/slurm.py --plan`` calls ``python -m lockstep.plan RESOURCES [fit] --config FILE …``."""

import json
import logging
import sys
from collections.abc import Sequence

from jsonargparse import Namespace
from rich.console import Console

from lockstep.config import DDPOptions, DeepSpeedOptions
from lockstep.core import LockstepError
from lockstep.planning.fake_step import profile_model
from lockstep.planning.table import Plan, Resources, format_bytes
from lockstep.trainer import parse_config, split_command

_WIDTH = 150


def main(arguments: Sequence[str]) -> int:
    """Print what fits of the run that ``arguments`` describe, after the resources, and return the exit status."""
    logging.basicConfig(format="lockstep: %(message)s")
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        resources = Resources(**json.loads(arguments[0]))
        _, keys = split_command(arguments[1:])
        _, config = parse_config(keys)
        precision = config.trainer.precision
        if precision == "auto":
            precision = "bf16-mixed" if resources.on_gpu else "32-true"
        model = profile_model(config, precision)
        plan = Plan(
            model,
            resources,
            precision,
            DDPOptions(**vars(config.ddp)),
            DeepSpeedOptions(**vars(config.deepspeed)),
            config.trainer.accumulate_grad_batches,
            reason_against_zero(config, precision),
        )
        console = Console(width=_WIDTH, highlight=False)
        console.print(
            f"{model.parameters:,} parameters, {model.trainable:,} of them trained, in {precision}; bytes of each rank:\n"
        )
        console.print(plan.table())
        console.print()
        console.print(plan.advice())
        console.print(f"Each rank makes the model in the memory of its node first: {format_bytes(plan.start)} on a node.")
        return 0
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status


def reason_against_zero(config: Namespace, precision: str) -> str:
    """Why the run of ``config`` cannot be with ZeRO, in a word or two; empty if it can."""
    if precision == "64-true":
        return "64 bits"
    if config.trainer.gradient_clip_algorithm == "value":
        return "clips by value"
    callbacks = config.trainer.callbacks or []
    names = [str(c.class_path) for c in (callbacks if isinstance(callbacks, list) else [callbacks])]
    return "averages weights" if any(name.endswith("WeightAveraging") for name in names) else ""
