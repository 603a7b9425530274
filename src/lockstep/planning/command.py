"""Print which strategies fit, for ``lockstep plan``: ``python -m lockstep.planning.command RESOURCES [fit] --config …``."""

import json
import logging
import sys
from collections.abc import Sequence

from jsonargparse import Namespace
from rich.console import Console

from lockstep.config import DDPOptions, DeepSpeedOptions, split_command
from lockstep.core import LockstepError, format_bytes
from lockstep.planning.memory import TrainingOptions
from lockstep.planning.model_profile import profile_model
from lockstep.planning.table import Plan, Resources
from lockstep.trainer import parse_config


def main(arguments: Sequence[str]) -> int:
    """Print the plan of a run and return the exit status; ``arguments`` are ``Resources`` as JSON, then those of the run."""
    logging.basicConfig(format="lockstep: %(message)s")
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        resources = Resources(**json.loads(arguments[0]))
        command, keys = split_command(arguments[1:])
        _, config = parse_config(keys, command)
        precision = config.trainer.precision
        if precision == "auto":
            precision = "bf16-mixed" if resources.on_gpu else "32-true"
        ddp, deepspeed = DDPOptions(**vars(config.ddp)), DeepSpeedOptions(**vars(config.deepspeed))
        options = TrainingOptions(precision, ddp, deepspeed, config.trainer.accumulate_grad_batches)
        plan = Plan(profile_model(config, precision), resources, options, zero_obstacle(config, precision))
        model = plan.model
        console = Console(width=150, highlight=False)
        console.print(
            f"{model.parameters:,} parameters, {model.trainable:,} of them trained, in {precision}; bytes per rank:\n"
        )
        console.print(plan.table())
        console.print()
        console.print(plan.recommendation())
        console.print(f"At its start, each rank builds the model in CPU memory: {format_bytes(plan.startup)} per node.")
        return 0
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status


def zero_obstacle(config: Namespace, precision: str) -> str:
    """Why the run of ``config`` cannot use ZeRO, in a few words; empty if it can."""
    if precision == "64-true":
        return "64 bits"
    if config.trainer.gradient_clip_algorithm == "value":
        return "clips by value"
    callbacks = config.trainer.callbacks or []
    names = [str(c.class_path) for c in (callbacks if isinstance(callbacks, list) else [callbacks])]
    return "averages weights" if any(name.endswith("WeightAveraging") for name in names) else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
