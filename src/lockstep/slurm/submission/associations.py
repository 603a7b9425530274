"""The user's associations and QOS with their limits, from Slurm's controller and its accounting database."""

import os
import pwd
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lockstep.slurm import query_slurm, start_query
from lockstep.slurm.submission.profile import parse_minutes

_NAMES = {
    "MaxTRESPJ": "MaxTRESPerJob", "MaxTRESPN": "MaxTRESPerNode", "MaxTRESPU": "MaxTRESPerUser",
    "MaxTRESPA": "MaxTRESPerAccount", "MaxTRESMinsPJ": "MaxTRESMinsPerJob", "MaxWallPJ": "MaxWall",
    "MaxJobsPU": "MaxJobsPerUser", "MaxJobsPA": "MaxJobsPerAccount", "MaxSubmitJobsPU": "MaxSubmitJobsPerUser",
    "MaxSubmitJobsPA": "MaxSubmitJobsPerAccount",
}  # fmt: skip
"""Limits by their name in ``scontrol show assoc_mgr``, and their name in ``sacctmgr``."""

_QOS_LIMITS = {
    "MaxWall": "maxwall", "MaxTRESPerJob": "maxtres", "MaxTRESPerNode": "maxtrespernode", "MaxTRESPerUser": "maxtrespu",
    "MaxTRESPerAccount": "maxtrespa", "MaxTRESMinsPerJob": "maxtresmins", "MaxJobsPerUser": "maxjobspu",
    "MaxJobsPerAccount": "maxjobspa", "MaxSubmitJobsPerUser": "maxsubmitpu", "MaxSubmitJobsPerAccount": "maxsubmitpa",
    "GrpTRES": "grptres", "GrpJobs": "grpjobs", "GrpSubmitJobs": "grpsubmit",
}  # fmt: skip
"""Limits of a QOS, and the field of ``sacctmgr show qos`` that has each."""

SHOW_CONFIG = ["scontrol", "show", "config"]
"""The command that prints Slurm's configuration."""

_ASSOC_MGR = ("scontrol", "--oneliner", "show", "assoc_mgr")
_SACCTMGR = ("sacctmgr", "--noheader", "--parsable2", "show")


class Limit(NamedTuple):
    """One limit.

    Attributes:
        name: As ``sacctmgr`` calls it.
        resource: ``cpu``, ``node``, ``gres/gpu`` …; empty for a number of jobs, or minutes.
        most: Memory in MB, times in minutes.
        used: By running jobs; for MaxSubmit… by waiting jobs too.
        place: ``QOS small``, ``account tiny``.
    """

    name: str
    resource: str
    most: float
    used: float
    place: str

    def __str__(self) -> str:
        return f"{self.name}={self.resource}{'=' if self.resource else ''}{self.most:g} of {self.place}"

    @property
    def key(self) -> tuple[str, str]:
        """What it limits: a QOS limit per user replaces the limit of the user's association."""
        return self.name.replace("PerUser", "") if "Jobs" in self.name else self.name, self.resource


class Association(NamedTuple):
    """An account of the user, in one partition or (empty) in all, with its valid QOS and its default QOS."""

    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str


class Accounting(NamedTuple):
    """What slurm.conf says about accounting.

    Attributes:
        enforced: ``associations``, ``limits``, ``qos``, … as in AccountingStorageEnforce; empty without accounting.
    """

    cluster: str
    enforced: frozenset[str]
    env: Mapping[str, str]

    @classmethod
    def parse(cls, shown: str, env: Mapping[str, str]) -> "Accounting":
        """Build it from what SHOW_CONFIG has printed."""
        values = dict(re.findall(r"^(\w+) *= (\S+)", shown, re.MULTILINE))
        enforced = values.get("AccountingStorageEnforce", "none").split(",")
        return cls(values.get("ClusterName", ""), frozenset(enforced) - {"none"}, env)

    def associations(self) -> list[Association]:
        """The user's associations on this cluster."""
        where = (f"user={user_name()}", f"cluster={self.cluster}", "format=account,partition,qos,defaultqos")
        rows = query_slurm([*_SACCTMGR, "associations", *where], self.env).stdout.splitlines()
        return [
            Association(account, partition, tuple(filter(None, qos.split(","))), default)
            for account, partition, qos, default in (row.split("|") for row in rows)
        ]

    def default_account(self) -> str | None:
        """The account of a job that names none; None where Slurm does not show it."""
        row = self._own_record(None)
        return row["Account"] if row is not None else None

    def limits(self, account: str | None, qos: str | None, partition: str | None) -> list[Limit]:
        """The limits that hold for a job of the user; empty if Slurm does not show them. None means the default.

        A limit of a QOS replaces that of an association. Of associations the nearest limit holds, but all Grp… limits do.
        """
        own = self._own_record(account, partition)
        if own is None:
            return []
        limits = self._qos_limits(own["Account"], qos, partition)
        known = {limit.key for limit in limits}
        for row, place in self._levels(own):
            new = [limit for limit in _row_limits(row, place) if limit.key not in known]
            limits += new
            known |= {limit.key for limit in new if not limit.name.startswith("Grp")}
        return limits

    def _own_record(self, account: str | None, partition: str | None = None) -> dict[str, str] | None:
        """The user's association with an account, or the default one: for the partition if there is one, else for all."""
        rows = self._records("flags=assoc", f"users={user_name()}")
        own = [row for row in rows if row["UserName"].partition("(")[0] == user_name()]
        own = [row for row in own if (row["Account"] == account if account else row["DefAssoc"] == "Yes")]
        return next((row for wanted in (partition or "", "") for row in own if row["Partition"] == wanted), None)

    def _levels(self, own: dict[str, str]) -> Iterator[tuple[dict[str, str], str]]:
        """The records of the user, of the account, and of those above it."""
        account: str | None = own["Account"]
        yield own, f"user {user_name()} in account {account}"
        while account:
            rows = self._records("flags=assoc", f"accounts={account}")
            row = next((row for row in rows if row["Account"] == account and not row["UserName"]), None)
            if row is not None:
                yield row, f"account {account}"
            account = row["ParentAccount"].partition("(")[0] if row is not None else None

    def _records(self, *which: str) -> list[dict[str, str]]:
        lines = query_slurm([*_ASSOC_MGR, *which], self.env).stdout.splitlines()
        return [_fields(line) for line in lines if line.startswith("ClusterName=")]

    def _qos_limits(self, account: str, qos: str | None, partition: str | None) -> list[Limit]:
        """The limits of the QOS of the job and of its partition; of both the larger one, as either may have precedence."""
        command = [*_SACCTMGR, "qos", f"format=name,{','.join(_QOS_LIMITS.values())}"]
        with start_query(command, self.env) as query:  # the database takes a moment, and _default_qos asks it too
            names = {qos or self._default_qos(account), self._partition_qos(partition)}
            rows, _ = query.communicate()
        found: dict[tuple[str, str], Limit] = {}
        for line in rows.splitlines():
            name, *values = line.split("|")
            if name not in names:
                continue
            used = self._usage_of_qos(name, account)
            for limit in _row_limits(dict(zip(_QOS_LIMITS, values, strict=True)), f"QOS {name}"):
                if limit.key not in found or found[limit.key].most < limit.most:
                    found[limit.key] = limit._replace(used=used.get((limit.name, limit.resource), 0.0))
        return list(found.values())

    def _default_qos(self, account: str) -> str:
        for association in self.associations():
            if association.account == account:
                only = association.qos[0] if len(association.qos) == 1 else "normal"
                return association.default_qos or only
        return "normal"

    def _partition_qos(self, name: str | None) -> str:
        """The QOS of a partition, or of the default one; empty for several, of which Slurm chooses one."""
        for line in query_slurm(["scontrol", "--oneliner", "show", "partition"], self.env).stdout.splitlines():
            row = _fields(line)
            if row.get("PartitionName") == name if name else row.get("Default") == "YES":
                return row.get("QoS", "")
        return ""

    def _usage_of_qos(self, qos: str, account: str) -> dict[tuple[str, str], float]:
        """How much of each limit of a QOS is used: by all, by the user, and by the account."""
        which = ("flags=qos", f"qos={qos}", f"users={user_name()}", f"accounts={account}")
        text = query_slurm([*_ASSOC_MGR, *which], self.env).stdout
        rows = [text.partition(" Account Limits=")[0]]
        for name in (re.escape(account), str(os.geteuid()), rf"{re.escape(user_name())}\(\d+\)"):
            rows += re.findall(rf" {name}={{([^}}]*)}}", text)
        limits = [limit for row in rows for limit in _row_limits(_fields(row), "")]
        return {(limit.name, limit.resource): limit.used for limit in limits}


def user_name() -> str:
    """The user's name, or number if it has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _fields(line: str) -> dict[str, str]:
    return dict(field.partition("=")[::2] for field in line.split() if "=" in field)


def _row_limits(row: Mapping[str, str], place: str) -> Iterator[Limit]:
    """The limits of one record that are set."""
    for name, value in row.items():
        if not re.fullmatch(r"(Max|Grp)(TRES|Wall|Jobs|Submit)(?!Accrue|Mins(?!P)|RunMins).*", name):
            continue
        if name == "MaxWall" and value:
            yield Limit(name, "", parse_minutes(value, name), 0.0, place)
            continue
        for item in value.split(","):
            resource, _, number = item.rpartition("=")
            if match := re.fullmatch(r"([\d.]+)([KMGT]?)(?:\(([\d.]+)\))?", number):
                most = float(match[1]) * (1024 ** "MGT".index(match[2]) if match[2] in ("M", "G", "T") else 1)
                yield Limit(_NAMES.get(name, name), resource, most, float(match[3] or 0), place)
