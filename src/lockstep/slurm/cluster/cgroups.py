"""Cgroups of a cluster: check what the machine allows, configure Slurm for it, and remove what killed nodes leave."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lockstep.slurm.cluster.conf import ClusterError, ClusterSpec

_ROOT = Path("/sys/fs/cgroup")

_CONTROLLERS = ("memory", "cpuset", "freezer")
"""The hierarchies of version 1 that Slurm uses."""

_SLURM_CONF = {
    "ProctrackType": "proctrack/cgroup",
    "TaskPlugin": "task/cgroup",
    "JobAcctGatherParams": "UsePss",  # without OverMemoryKill, as the kernel enforces the limit
}

_CGROUP_CONF = {
    "v1": "CgroupPlugin=cgroup/v1\n",
    # Without systemd: a container has none, and it would create a scope for each node.
    "v2": "CgroupPlugin=cgroup/v2\nIgnoreSystemd=yes\nCgroupAutomount=yes\n",
}


def check_cgroups(folder: Path, root: Path = _ROOT) -> None:
    """Raise ClusterError if the cluster in ``folder`` cannot use cgroups on this machine, or another cluster uses them."""
    _version(root)
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.path.basename(os.readlink(path / "exe")).startswith("slurmd"):
                other = Path(os.readlink(path / "cwd")).parent
                if other != folder and "proctrack/cgroup" in (other / "slurm.conf").read_text():
                    raise ClusterError(
                        f"--cgroups: the cluster in {other} uses cgroups already, and the nodes of both would share them; "
                        "stop it first with `down`."
                    )


def _version(root: Path) -> str:
    """``v1`` or ``v2``, whichever has a memory controller that this user may use."""
    for version, parents in (("v1", [root / name for name in _CONTROLLERS]), ("v2", [root])):
        probes = [parent / f"lockstep-probe-{os.getpid()}" for parent in parents]
        try:
            if version == "v2" and "memory" not in (root / "cgroup.subtree_control").read_text().split():
                continue
            for probe in probes:
                probe.mkdir()
            if all((probe / "cgroup.procs").exists() for probe in probes):
                return version
        except OSError:
            continue
        finally:
            for probe in probes:
                with contextlib.suppress(OSError):
                    probe.rmdir()
    raise ClusterError(
        f"--cgroups: this user cannot create a cgroup with a memory limit below {root}; that needs root, and in a container "
        "a writable /sys/fs/cgroup (docker run --privileged). Without --cgroups Slurm polls the memory of a job every second."
    )


def binds_cpus(spec: ClusterSpec) -> bool:
    """Whether tasks are bound to CPUs: not if a node has more CPUs than the machine."""
    return spec.cgroups and spec.cpus <= (os.cpu_count() or 1)


def slurm_conf_values(spec: ClusterSpec) -> dict[str, str]:
    """Values that replace those of slurm.conf."""
    binding = {"TaskPlugin": "task/affinity,task/cgroup"} if binds_cpus(spec) else {}
    return _SLURM_CONF | binding if spec.cgroups else {}


def cgroup_conf(spec: ClusterSpec, without: str) -> str:
    """The content of cgroup.conf; ``without`` is the plugin for a cluster that uses none."""
    if not spec.cgroups:
        return f"CgroupPlugin={without}\n"
    cores = "yes" if binds_cpus(spec) else "no"
    limits = f"ConstrainRAMSpace=yes\nConstrainSwapSpace=yes\nAllowedSwapSpace=0\nConstrainCores={cores}\n"
    return _CGROUP_CONF[_version(_ROOT)] + limits


def is_limited(shown: str) -> bool:
    """Whether a task that has printed its /proc/self/cgroup is in the memory cgroup of a job."""
    return re.search(r"(:memory:|^0::).*job_\d", shown, re.MULTILINE) is not None


def remove_cgroups(nodes: Sequence[str], root: Path = _ROOT) -> None:
    """Remove the empty cgroups of the nodes, which a killed slurmd leaves."""
    tops = [root / controller / f"slurm_{node}" for controller in _CONTROLLERS for node in nodes]
    tops += [root / "system.slice" / f"{node}_slurmstepd.scope" for node in nodes]
    for top in tops:
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
