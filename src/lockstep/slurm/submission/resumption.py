"""The resources of a run that is resumed: those that it was submitted with, where no flag says otherwise."""

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.core import UsageError
from lockstep.runs import LaunchRecord, Run
from lockstep.slurm.submission.options import NodeRange
from lockstep.slurm.submission.profile import Profile, apply_flags, load_profile

_PLACES = {"nodelist", "exclude"}
"""A flag of one of them replaces both: together they may leave no node."""


def submitted_nodes(run: Run, launch: LaunchRecord) -> NodeRange:
    """The number of nodes that ``run`` was submitted with; raise UsageError if the record is damaged."""
    try:
        return NodeRange.parse(str(launch.nodes))
    except ArgumentTypeError as error:
        raise UsageError(f"--resume: {run.launch}: nodes: {error}; say with --nodes how many.") from None


def submitted_profile(run: Run, launch: LaunchRecord, flags: Mapping[str, Any], folders: Sequence[Path]) -> Profile:
    """The profile and flags that ``run`` was submitted with, as ``launch`` records them, but not that it was held.

    Args:
        flags: The flags given now, which will override it; None for those that are not given.
        folders: Where to look for the profile, which has the values of its environment.

    Raises:
        UsageError: The record is damaged, or the profile is gone whose environment the run had.
    """
    otherwise = "say with --profile and other flags which resources the run needs"
    if not isinstance(values := launch.slurm or {}, dict):
        raise UsageError(f"--resume: {run.launch} is damaged: slurm: {values!r}; {otherwise}.")
    if names := values.get("environment"):
        try:
            known = load_profile(launch.profile, {}, folders).environment
        except UsageError:
            known = {}
        if gone := [name for name in names if name not in known]:
            source = launch.profile or "its profile"
            raise UsageError(f"--resume: {gone[0]} of the run's environment is not in {source} any more; {otherwise}.")
        values = values | {"environment": {name: known[name] for name in names}}
    if any(flags.get(name) is not None for name in _PLACES):
        values = {name: value for name, value in values.items() if name not in _PLACES}
    if "sbatch" in values:
        values = values | {"sbatch": [argument for argument in values["sbatch"] if argument != "--hold"]}
    try:
        return apply_flags(Profile(), values)
    except UsageError as error:
        raise UsageError(f"--resume: {run.launch}: {error.message} Or {otherwise}.") from None


def describe_resources(nodes: NodeRange, profile: Profile) -> str:
    """One line: the nodes, and all that differs from an empty profile, in the form of flags."""
    parts = [f"--nodes {nodes}"]
    for name, value in profile.non_default_values().items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, tuple | list):
            parts.append(f"{flag} {' '.join(value)}")
        else:
            parts.append(flag if value is True else f"{flag} {getattr(value, 'image', value)}")
    return " ".join(parts)
