"""The resources of a resumed run: those of its submission, unless a flag overrides them."""

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.core import UsageError
from lockstep.runs import LaunchRecord, Run
from lockstep.slurm.submission.options import NodeRange
from lockstep.slurm.submission.profile import Profile, load_profile, make_profile

_PLACES = {"nodelist", "exclude"}
"""A flag for one of them replaces both: together they may exclude every node."""


def submitted_nodes(run: Run, launch: LaunchRecord) -> NodeRange:
    """The number of nodes that ``run`` was submitted with; raise UsageError if the record is damaged."""
    try:
        return NodeRange.parse(str(launch.nodes))
    except ArgumentTypeError as error:
        raise UsageError(f"--resume: {run.launch}: nodes: {error}; set --nodes.") from None


def submitted_profile(run: Run, launch: LaunchRecord, flags: Mapping[str, Any], folders: Sequence[Path]) -> Profile:
    """The resources that ``run`` was submitted with, as ``launch`` records them, without ``--hold``.

    Args:
        flags: The flags given now, which will override it; None for those that are not given.
        folders: Where to look for the profile: the record has only the names of its environment, not the values.

    Raises:
        UsageError: The record is damaged, or the profile no longer has the environment of the run.
    """
    remedy = "give the resources with --profile and other flags"
    if not isinstance(values := launch.slurm or {}, dict):
        raise UsageError(f"--resume: {run.launch} is damaged: slurm: {values!r}; {remedy}.")
    if isinstance(names := values.get("environment"), list):
        try:
            known = load_profile(launch.profile, {}, folders).environment
        except UsageError:
            known = {}
        if gone := [name for name in names if name not in known]:
            source = launch.profile or "its profile"
            raise UsageError(
                f"--resume: the run had the environment variable {gone[0]}, which {source} no longer sets; {remedy}."
            )
        values = values | {"environment": {name: known[name] for name in names}}
    if any(flags.get(name) is not None for name in _PLACES):
        values = {name: value for name, value in values.items() if name not in _PLACES}
    try:
        profile = make_profile(values)
    except UsageError as error:
        raise UsageError(f"--resume: {run.launch}: {error.message} Or {remedy}.") from None
    return replace(profile, sbatch=tuple(argument for argument in profile.sbatch if argument != "--hold"))


def describe_resources(nodes: NodeRange, profile: Profile) -> str:
    """The nodes, and all values that differ from an empty profile, as one line of flags."""
    parts = [f"--nodes {nodes}"]
    for name, value in profile.non_default_values().items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, tuple | list):
            parts.append(f"{flag} {' '.join(value)}")
        else:
            parts.append(flag if value is True else f"{flag} {getattr(value, 'image', value)}")
    return " ".join(parts)
