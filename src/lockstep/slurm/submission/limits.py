"""Check a job against the limits of its account and QOS: beyond most of them Slurm queues a job but never starts it."""

import re

from lockstep.core import UsageError, count, did_you_mean
from lockstep.slurm.submission.associations import Accounting, Limit, user_name
from lockstep.slurm.submission.batch_script import JobRequest, node_cpus
from lockstep.slurm.submission.profile import Profile, parse_size

_KEYS = {
    "node": ("nodes", "node"),
    "cpu": ("cpus_per_rank", "CPU"),
    "mem": ("mem", "MB"),
    "gres/gpu": ("gpus_per_node", "GPU"),
}
"""Key that requests a resource, and a noun for it."""

_OTHERWISE = "or choose another account or QOS"


def check_limits(request: JobRequest, accounting: Accounting) -> list[str]:
    """Return a sentence about each limit that makes this job wait for others; empty where no limits are enforced.

    Raises:
        UsageError: A limit would keep it waiting forever.
    """
    if not accounting.enforced & {"limits", "safe", "all"}:
        return []
    notes = []
    for limit in accounting.limits(*_charged(request), request.profile.partition):
        if limit.name == "MaxWall":
            _check_time(limit, request)
        elif "Submit" in limit.name:  # sbatch itself refuses
            continue
        elif "Jobs" in limit.name:
            if limit.used >= limit.most:
                notes.append(f"The job will wait: {limit}, which has {count(round(limit.used), 'job')} now.")
        elif note := _check_resource(limit, request):
            notes.append(note)
    return notes


def _charged(request: JobRequest) -> tuple[str | None, str | None]:
    """Account and QOS of the job; None leaves one to Slurm."""
    return _requested("account", request.profile), _requested("qos", request.profile)


def _requested(name: str, profile: Profile) -> str | None:
    """The account or QOS of a profile, or of its arguments of sbatch, in lower case, as Slurm writes it."""
    flags = [argument.partition("=")[2] for argument in profile.sbatch if argument.startswith(f"--{name}=")]
    text: str | None = flags[-1] if flags else getattr(profile, name)
    return text.lower() if text is not None else None


def _minutes(request: JobRequest) -> int | None:
    is_overridden = any(argument.startswith("--time=") for argument in request.profile.sbatch)
    return None if is_overridden else request.profile.minutes


def _check_time(limit: Limit, request: JobRequest) -> None:
    minutes = _minutes(request)
    if minutes is not None and minutes > limit.most:
        raise UsageError(
            f"time: {request.profile.time} exceeds {limit} (minutes): the job would never start; ask for {limit.most:g} or "
            f"less, {_OTHERWISE}."
        )


def _check_resource(limit: Limit, request: JobRequest) -> str:
    """Return a sentence if the job must wait until others release a resource."""
    profile, nodes = request.profile, request.options.nodes.min
    memory = parse_size(profile.mem) / (1 << 20) if profile.mem else 0
    per_node = {"node": 1, "cpu": node_cpus(profile), "mem": memory, "gres/gpu": profile.gpus_per_node}
    asked = float(per_node.get(limit.resource, 0)) * (1 if limit.name == "MaxTRESPerNode" else nodes)
    key, noun = _KEYS.get(limit.resource, (limit.resource, limit.resource))
    amount = f"{asked:g} MB" if limit.resource == "mem" else count(round(asked), noun)
    what = amount + (" per node" if limit.name == "MaxTRESPerNode" else "")
    if "Mins" in limit.name:
        asked *= _minutes(request) or 0
        what = f"{asked:g} minutes of {noun}s"
    if asked > limit.most:
        raise UsageError(f"{key}: {what} exceed {limit}: the job would never start; ask for less, {_OTHERWISE}.")
    if limit.used and asked and asked + limit.used > limit.most:
        return f"The job will wait: {limit}, of which {limit.used:g} are in use, and it asks for {asked:g}."
    return ""


def explain_policy(error: str, request: JobRequest, accounting: Accounting) -> None:
    """Raise UsageError with a sentence about an error of sbatch, if it is about the account, the QOS or a limit."""
    if not re.search(r"(?i)invalid (account|qos)|accounting/QOS policy", error):
        return
    (account, qos), user = _charged(request), user_name()
    associations = accounting.associations()
    accounts = sorted({association.account for association in associations})
    if account is not None and accounts and account not in accounts:
        raise UsageError(f"account: {account!r} is not an account of {user}{did_you_mean(account, accounts)}")
    account = account or accounting.default_account()
    valid = sorted({name for one in associations if one.account == account for name in one.qos})
    if qos is not None and valid and qos not in valid:
        raise UsageError(f"qos: {qos!r} is not valid for {user} in account {account}{did_you_mean(qos, valid)}")
    if "policy" in error:
        _explain_limit(error, request, accounting)
    if not accounts:
        raise UsageError(f"account: {user} has no account on this cluster; ask its administrators for one.")


def _explain_limit(error: str, request: JobRequest, accounting: Accounting) -> None:
    """Raise UsageError with the limit that sbatch enforces."""
    check_limits(request, accounting)
    for limit in accounting.limits(*_charged(request), request.profile.partition):
        if "Submit" in limit.name and limit.used + request.runs > limit.most:
            jobs = f"a sweep of {request.runs} runs" if request.runs > 1 else "another job"
            raise UsageError(
                f"Slurm rejects this job: {limit} does not allow {jobs}, as it has {count(round(limit.used), 'job')} now; "
                f"wait until they have ended, make a sweep smaller, {_OTHERWISE}."
            )
    reason = re.search(r"error: ((?:Assoc|QOS)\w+)", error)
    raise UsageError(
        f"Slurm rejects this job: it exceeds a limit of its account or QOS{f' ({reason[1]})' if reason else ''}; ask for less, "
        f"{_OTHERWISE}."
    )
