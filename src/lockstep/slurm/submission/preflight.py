"""What only torch and the classes of a config can tell, asked of another process before anything is queued. No torch here."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from lockstep.core import UsageError
from lockstep.slurm.submission.profile import parse_size
from lockstep.slurm.submission.submission import Submission


def resolve_config(submission: Submission, env: Mapping[str, str]) -> str:
    """The complete config, built as the ranks will build it.

    Raises:
        UsageError: What the job would have said.
    """
    return _run_module(["lockstep.cli", "train"], submission, ["--print_config"], env).stdout


def plan_memory(submission: Submission, env: Mapping[str, str]) -> tuple[str, str]:
    """Which ways to train the model fit into the memory that the profile tells of, and what could not be found out.

    Raises:
        UsageError: What the job would have said, or the model cannot be planned for.
    """
    profile = submission.profile
    on_gpu = profile.gpus_per_node > 0
    node = parse_size(profile.mem) if profile.mem else 0
    memory = profile.gpu_memory and parse_size(profile.gpu_memory) if on_gpu else node // profile.ranks
    resources = {
        "nodes": submission.nodes.max,
        "ranks": profile.ranks,
        "on_gpu": on_gpu,
        "memory": memory or None,
        "host": node or None,
    }
    asked = _run_module(["lockstep.cli", "plan", json.dumps(resources)], submission, [], env)
    return asked.stdout, asked.stderr


def _run_module(
    module: Sequence[str], submission: Submission, more: Sequence[str], env: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a module with the arguments of the (first) run, in the Python of the ranks; where that is in an image, the one here.

    Raises:
        UsageError: What it said when it failed.
    """
    profile = submission.profile
    python = sys.executable if profile.container or not profile.python else profile.python
    paths = os.pathsep.join(map(str, submission.live_code(env).paths))
    command = [python, "-m", *module, submission.command, *submission.first_run_arguments(), *more]
    env = {**env, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    try:
        asked = subprocess.run(command, env=env, capture_output=True, text=True)
    except OSError as error:
        raise UsageError(f"python: {python} cannot be run here ({error.strerror}); give the path of an interpreter.") from None
    if asked.returncode:
        lines = asked.stderr.strip().splitlines() or [
            f"{python} ended with status {asked.returncode} and without a word; was there too little memory?"
        ]
        said = lines[-1].removeprefix("lockstep: ")
        raise UsageError(said + (" (Said by the Python here; that of the image was not asked.)" if profile.container else ""))
    return asked
