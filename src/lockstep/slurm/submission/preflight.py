"""Checks before submission that need torch and the classes of the config; they run in another process."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from lockstep.core import UsageError
from lockstep.slurm.submission.profile import parse_size
from lockstep.slurm.submission.submission import Submission


def resolve_config(submission: Submission, env: Mapping[str, str]) -> str:
    """Return the complete config as YAML, built as the ranks will build it; raise UsageError if they would reject it."""
    return _run_module(["lockstep.cli", "train"], submission, ["--print_config"], env).stdout


def plan_memory(submission: Submission, env: Mapping[str, str]) -> tuple[str, str]:
    """Return a table of the strategies that fit into the profile's memory, and notes on what remains unknown."""
    profile = submission.profile
    on_gpu = profile.gpus_per_node > 0
    node = parse_size(profile.mem) if profile.mem else 0
    memory = profile.gpu_memory and parse_size(profile.gpu_memory) if on_gpu else node // profile.ranks
    resources = {
        "nodes": submission.options.nodes.max,
        "ranks": profile.ranks,
        "on_gpu": on_gpu,
        "memory": memory or None,
        "host": node or None,
    }
    done = _run_module(["lockstep.planning.command", json.dumps(resources)], submission, [], env)
    return done.stdout, done.stderr


def _run_module(
    module: Sequence[str], submission: Submission, flags: Sequence[str], env: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a module of lockstep on the first run, with the Python of the ranks; for a container, the launcher's."""
    profile = submission.profile
    python = sys.executable if profile.container or not profile.python else profile.python
    paths = os.pathsep.join(map(str, submission.live_code(env).paths))
    arguments = [*module, submission.command, *submission.run_arguments(), *flags]
    env = {**env, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run([python, "-m", *arguments], env=env, capture_output=True, text=True)
    except OSError as error:
        raise UsageError(f"python: cannot run {python} ({error.strerror}); give the path of an interpreter.") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [
            f"{python} ended with exit status {done.returncode} and without a message; it may have run out of memory."
        ]
        note = " (Checked with the Python of this machine, not with that of the image.)" if profile.container else ""
        raise UsageError(lines[-1].removeprefix("lockstep: ") + note)
    return done
