"""Fixtures of tests/slurm: a cluster of four pretend nodes, and shells on its login node."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.slurm.cluster import Cluster
from lockstep.slurm.cluster.conf import search_path
from support.slurm_jobs import Shell, login_environment

MISSING = "Slurm is not installed; as root: apt-get install slurmctld slurmd slurm-client munge (or: make slurm)"


@pytest.fixture(scope="session")
def slurm_is_here() -> None:
    """Skip the test where Slurm is not installed, or fail it where the environment requires Slurm, as CI's does."""
    if shutil.which("slurmctld", path=search_path()) is None:
        if os.environ.get("LOCKSTEP_REQUIRE_SLURM"):
            pytest.fail(MISSING)
        pytest.skip(MISSING)


@pytest.fixture(scope="session")
def cluster(slurm_is_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes of four CPUs and 64 GB, without GPUs.

    Partition `short` has a time limit of one minute, and jobs in `high` preempt those in `low`, which have 5 s of grace.
    """
    folder = tmp_path_factory.mktemp("c") / "c"
    with Cluster.up(
        folder,
        nodes=4,
        cpus=4,
        memory=64000,
        partitions=[
            "debug Default=YES PreemptMode=OFF",
            "short MaxTime=1 PreemptMode=OFF",
            "low PreemptMode=REQUEUE GraceTime=5",
            "high PriorityTier=10",
        ],
        options=[
            *("SlurmdTimeout=5", "MessageTimeout=2", "KillWait=2"),
            *("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE"),
        ],
    ) as cluster:
        yield cluster


@pytest.fixture
def shell(cluster: Cluster, tmp_path: Path) -> Iterator[Shell]:
    """A shell in a new project with the toy model. Its jobs are cancelled after the test."""
    yield (made := make_shell(cluster, tmp_path))
    made.close()


@pytest.fixture(scope="module")
def long_shell(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell for jobs that run beside several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield (made := make_shell(cluster, tmp_path_factory.mktemp("long")))
    made.close()


def make_shell(cluster: Cluster, folder: Path) -> Shell:
    """A shell in a new project below ``folder``."""
    project = folder / "pro ject"
    project.mkdir()
    for name in ("toy_model.py", "toy_model.yaml", "fault_callbacks.py"):
        shutil.copy(Path(__file__).with_name(name), project)
    return Shell(cluster, project, login_environment(cluster, folder))
