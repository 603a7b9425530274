"""Decide whether resuming a finished run would do anything."""

from collections.abc import Mapping
from typing import Any

from lockstep.config.validation import validate_arguments
from lockstep.core import count
from lockstep.runs.records import RunResult
from lockstep.runs.run import Run


def nothing_left(run: Run, config: Mapping[str, Any]) -> str | None:
    """Say in one sentence why resuming ``run`` with this ``config`` would do nothing; None if it would train or test.

    It would do nothing if training and final test have finished, and ``config`` is that of the run or has limits that are
    reached.

    Raises:
        UsageError: ``config.yaml`` of the run is damaged.
    """
    result = RunResult.read(run.result)
    if result is None or not result.is_finished or result.test_error is not None or result.command != "fit":
        return None
    done = {"max_steps": result.global_step, "max_epochs": result.epochs}
    limits = {f"trainer.{key}": config["trainer"].get(key) for key in done}
    reached = [
        key
        for (key, limit), number in zip(limits.items(), done.values(), strict=True)
        if isinstance(limit, int) and number is not None and 0 <= limit <= number
    ]
    if not reached and config != validate_arguments(["--config", str(run.config)]):
        return None
    more = f"raise {' and '.join(f'{key} ({limits[key]})' for key in reached)}" if reached else "change what has ended it"
    what = f"{count(result.global_step or 0, 'step')}, {count(result.epochs or 0, 'epoch')}"
    return f"{run.folder} is finished ({what}), so there is nothing to do; to train on, {more}."
