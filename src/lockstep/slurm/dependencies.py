"""Dependencies between jobs, in the forms of ``--after``, ``sbatch --dependency`` and ``squeue``."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lockstep.core import UsageError, count, did_you_mean
from lockstep.slurm.registry import find_job

KINDS = {
    "after": "{} to start",
    "afterany": "{} to end",
    "afterburstbuffer": "{} to write its burst buffer",
    "aftercorr": "the same run of {} to finish successfully",
    "afternotok": "{} to fail",
    "afterok": "{} to finish successfully",
    "singleton": "your other jobs of this name to end",
}
"""The conditions of Slurm, and what a job waits for under each."""

_JOB = re.compile(r"\d+(_(\d+|\*))?")

_EXAMPLES = "give job ids, run folders, or a dependency of Slurm, such as afterany:12:13,singleton"


class Condition(NamedTuple):
    """One condition on some jobs.

    Attributes:
        kind: One of ``KINDS``.
        jobs: Ids of jobs; each may end with ``+MINUTES`` for the kind ``after``.
    """

    kind: str
    jobs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join((self.kind, *self.jobs))

    @property
    def ids(self) -> list[str]:
        """Ids of the jobs."""
        return [job.partition("+")[0] for job in self.jobs]

    def describe(self) -> str:
        """What a job waits for, such as ``job 12 to end``."""
        if delays := {job.partition("+")[2] for job in self.jobs} - {""}:
            waits = " and ".join(count(int(delay), "minute") for delay in sorted(delays))
            return f"the start of {_name(self.ids)}, and {waits} more"
        return KINDS.get(self.kind, f"{self.kind} of {{}}").format(_name(self.ids))


class Dependency(NamedTuple):
    """Conditions that must all hold before a job starts; with ``is_any`` one is enough."""

    conditions: tuple[Condition, ...]
    is_any: bool = False

    def __str__(self) -> str:
        return ("?" if self.is_any else ",").join(map(str, self.conditions))

    @classmethod
    def on(cls, kind: str, job: str) -> "Dependency":
        """The dependency on one job."""
        return cls((Condition(kind, (job,)),))

    @classmethod
    def parse(cls, texts: Sequence[str], env: Mapping[str, str]) -> "Dependency":
        """Parse the values of ``--after``, of which all must hold; a job without a kind must finish successfully.

        A job is its id, or the id or folder of a run that lockstep has submitted to this cluster.

        Raises:
            UsageError: A text is not a dependency, or a run is not known.
        """
        conditions: list[Condition] = []
        any_of = [text for text in texts if "?" in text and not Path(text).exists()]
        for text in texts:
            if Path(text).exists():
                conditions.append(Condition("afterok", (_find(text, text, env),)))
                continue
            if "?" in text and ("," in text or len(texts) > 1):
                raise UsageError(
                    f"--after: {' '.join(texts)!r} mixes conditions that must all hold (a comma, or several values) with "
                    "alternatives (?), which Slurm does not support; use one of them."
                )
            conditions += [_parse_condition(part, text, env) for part in re.split("[,?]", text)]
        return cls(_alternatives(conditions) if any_of else _join(conditions), is_any=bool(any_of))

    @classmethod
    def of_squeue(cls, text: str) -> "Dependency":
        """Read what squeue shows: the conditions that do not hold yet, such as ``afterok:12(unfulfilled)``."""
        parts = re.split("[,?]", re.sub(r"\(\w+\)", "", text))
        conditions = [Condition(kind, tuple(jobs)) for kind, *jobs in (part.split(":") for part in parts if part)]
        return cls(_alternatives(conditions), True) if "?" in text else cls(_join(conditions))

    def describe(self) -> str:
        """What a job waits for, as words."""
        return (", or for " if self.is_any else ", and for ").join(condition.describe() for condition in self.conditions)


def _alternatives(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """Split conditions into one for each job, as only one of all has to hold."""
    return tuple(condition._replace(jobs=(job,) if job else ()) for condition in conditions for job in condition.jobs or ("",))


def _join(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """Merge neighbouring conditions of the same kind, with each job once."""
    joined: list[Condition] = []
    for condition in conditions:
        if joined and joined[-1].kind == condition.kind:
            joined[-1] = joined[-1]._replace(jobs=tuple(dict.fromkeys((*joined[-1].jobs, *condition.jobs))))
        else:
            joined.append(condition)
    return tuple(joined)


def _name(jobs: Sequence[str]) -> str:
    """``job 12``, or ``jobs 12 and 13``; of an array that waits as a whole, squeue shows ``12_*``."""
    names = [job.removesuffix("_*") for job in jobs]
    return f"job {names[0]}" if len(names) == 1 else f"jobs {', '.join(names[:-1])} and {names[-1]}" if names else "jobs"


def _parse_condition(part: str, text: str, env: Mapping[str, str]) -> Condition:
    """Parse one condition of the dependency ``text``."""
    kind, colon, rest = part.partition(":")
    if kind not in KINDS:
        if not colon:
            return Condition("afterok", (_find(part, text, env),))
        if _JOB.fullmatch(kind):
            raise UsageError(f"--after: {part!r} does not say when: write afterok:{part}, or separate the jobs by spaces.")
        raise UsageError(f"--after: {kind!r} in {text!r} is not a kind of dependency{did_you_mean(kind, KINDS)}")
    if kind == "singleton":
        if colon:
            raise UsageError(f"--after: {part!r}: singleton takes no jobs: it waits for all jobs of the same name.")
        return Condition(kind)
    if not rest:
        raise UsageError(f"--after: {part!r} needs jobs, such as {kind}:12 or {kind}:12:13.")
    jobs = []
    for job in rest.split(":"):
        name, delay = job, ""
        if found := re.fullmatch(r"(.*)(\+\d+)", job):
            name, delay = found.groups()
            if kind != "after":
                raise UsageError(f"--after: {part!r}: only after:JOB+MINUTES takes minutes; leave out {delay}.")
        jobs.append(_find(name, text, env) + delay)
    return Condition(kind, tuple(jobs))


def _find(name: str, text: str, env: Mapping[str, str]) -> str:
    """The id of the job ``name`` in the dependency ``text``."""
    if _JOB.fullmatch(name):
        return name
    where = "" if name == text else f" in {text!r}"
    if not name:
        raise UsageError(f"--after: {text!r} has an empty place where a job is expected; {_EXAMPLES}.")
    try:
        job = find_job(name, env)
    except UsageError:
        kinds = did_you_mean(name, KINDS)
        meant = kinds.rstrip("?.") if "did you mean" in kinds else ""
        raise UsageError(
            f"--after: {name!r}{where} is neither a job id nor a run that lockstep has submitted here{meant}; {_EXAMPLES}."
        ) from None
    if job.is_recycled:
        raise UsageError(f"--after: the job {job.job} of {name} ended long ago, and Slurm has given its id to another job.")
    return job.job
