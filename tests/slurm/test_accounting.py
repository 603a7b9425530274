"""Accounting: what sacct has printed, then real jobs that slurmctld has forgotten, and limits of accounts and QOS.

One cluster with slurmdbd, and with cgroups where the machine allows them. Its jobs are stubs that use no CPU.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.waiting import wait_until

from lockstep.core import UsageError
from lockstep.runs import CodePaths, Run, RunResult
from lockstep.slurm import SubmittedJob, accounted_states, member_runs, query_status
from lockstep.slurm.accounting import parse_accounting
from lockstep.slurm.cluster import Cluster, ClusterError, binds_cpus
from lockstep.slurm.cluster.cgroups import check_cgroups
from lockstep.slurm.cluster.conf import check_programs
from lockstep.slurm.dependencies import Dependency
from lockstep.slurm.status import RunStatus
from lockstep.slurm.submission.batch_script import JobRequest
from lockstep.slurm.submission.options import LaunchOptions, NodeRange
from lockstep.slurm.submission.profile import Profile
from lockstep.slurm.submission.sbatch import check_dependency, check_schedulable

pytestmark = pytest.mark.timeout(150)

SACCT = """\
3|100|CANCELLED by 0|None|101|00:00:03|00:10:00|n1|0:0||2000M
3.batch|101|CANCELLED||101|00:00:03||n1|0:15|301K|
6|100|PREEMPTED|None|101|00:00:06|00:10:00|n3|0:0||2000M
6.batch|101|CANCELLED||101|00:00:06||n3|0:15|377K|
5_0|100|COMPLETED|None|101|00:00:06|00:10:00|n1|0:0||2000M
5_2|100|FAILED|JobArrayTaskLimit|105|00:00:05|UNLIMITED|n2|2:0||2000M
5_[1-4,9%2]|100|CANCELLED by 0|JobArrayTaskLimit|109|00:00:00|UNLIMITED|None assigned|0:0||2000M
12|100|CANCELLED|Dependency|Unknown|00:00:00|Partition_Limit|None assigned|0:0||2000M
6|106|COMPLETED|BeginTime|111|00:00:04|UNLIMITED|n3|0:0||2000M
6.batch|111|COMPLETED||111|00:00:04||n3|0:0|408K|
7|100|FAILED|None|101|00:00:09|UNLIMITED|n3|6:0||50M
7.batch|101|FAILED||101|00:00:09||n3|6:0|1000K|
7.0|101|OUT_OF_MEMORY||101|00:00:04||n3|0:125|49.50M|
8|100|COMPLETED|None|101|00:00:09|UNLIMITED|n3|0:0||50M
8.0|101|OUT_OF_MEMORY||101|00:00:04||n3|0:125|49.50M|
8.1|105|COMPLETED||105|00:00:04||n3|0:0|30M|
9|100|RUNNING|None|101|00:00:09|UNLIMITED|n3|0:0||50M
13|100|CANCELLED|None|None|00:00:00|Partition_Limit|None assigned|0:0||4G
14|100|CANCELLED by 0|None|None|00:00:00|Partition_Limit|None assigned|0:0||4G
"""
"""What sacct of Slurm 22.05 has printed, and 24.11 (13 and 14); the steps of 7 and 8, and 9, are put together from others."""


def test_the_newest_incarnation_of_each_job_and_each_run_of_an_array_is_read() -> None:
    states = parse_accounting(SACCT)
    assert {job: (state.state, state.restarts, state.exit_status) for job, state in states.items()} == {
        "3": ("CANCELLED", 0, 0),
        "6": ("COMPLETED", 1, 0),
        "5_0": ("COMPLETED", 0, 0),
        "5_1": ("CANCELLED", 0, 0),
        "5_2": ("FAILED", 0, 2),
        "5_3": ("CANCELLED", 0, 0),
        "5_4": ("CANCELLED", 0, 0),
        "5_9": ("CANCELLED", 0, 0),
        "7": ("OUT_OF_MEMORY", 0, 6),
        "8": ("COMPLETED", 0, 0),
        "9": ("RUNNING", 0, 0),
        **dict.fromkeys(("12", "13", "14"), ("CANCELLED", 0, 0)),
    }
    assert states["7"].memory == "49.50M of 50M"
    assert [job for job, state in states.items() if state.reason == "DependencyNeverSatisfied"] == ["12", "13"]


SQUEUE = "#!/bin/sh\nexit 0\n"


@pytest.mark.parametrize(
    ("sacct", "state", "message"),
    [
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", "gone", ""),
        ("echo 'sacct: error: Connection refused' >&2; exit 1", "gone", " Accounting does not answer: Connection refused"),
        ("echo '7|100|RUNNING|None|101|00:00:09|UNLIMITED|n3|0:0||50M'", "gone", ""),
        ("echo '7|100|TIMEOUT|None|101|00:00:09|00:09:00|n3|0:0||50M'", "over its time limit", ""),
    ],
)
def test_what_accounting_does_not_know_is_guessed_as_without_it(tmp_path: Path, sacct: str, state: str, message: str) -> None:
    """A job that accounting believes to run although slurmctld does not know it has been lost with its end."""
    for name, script in (("squeue", SQUEUE), ("sacct", f"#!/bin/sh\necho asked >>{tmp_path}/asked\n{sacct}\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    run = Run.create(tmp_path / "runs", "x")
    (run.folder / "slurm").mkdir()
    for _ in range(2):
        (status,) = query_status([SubmittedJob("7", run.folder, "x", 1, "")], {"PATH": f"{tmp_path}:/usr/bin:/bin"})
        assert status.state == state and status.message.endswith(message or ".")
        assert ("Accounting" in status.message) == bool(message)
    times = 1 if state != "gone" else 2  # an answer is kept
    assert len((tmp_path / "asked").read_text().split()) == times


@dataclass
class Stubs:
    """Submits jobs that are registered as runs of lockstep, but only run a shell script."""

    cluster: Cluster
    folder: Path
    has_cgroups: bool  # where they are not possible, the OUT_OF_MEMORY of sacct is tested only as text
    jobs: dict[str, SubmittedJob] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | self.cluster.env

    def submit(self, name: str, script: str, *options: str, runs: int = 1) -> str:
        """Submit a job, or an array, whose first run has left the result of a finished one if its name says so."""
        first = Run.create(self.folder, name)
        runs_of_job = member_runs(first.folder, runs)
        for run in runs_of_job:
            (run.folder / "slurm").mkdir(parents=True, exist_ok=True)
        if "finished" in name:
            RunResult("finished").write(runs_of_job[0].result)
        array = [f"--array=0-{runs - 1}"] if runs > 1 else []
        job = self.cluster.command("sbatch", "--parsable", "--output=/dev/null", *array, *options, f"--wrap={script}").strip()
        self.jobs[name] = SubmittedJob(job, first.folder, name, runs, "")
        return job

    def state(self, name: str) -> str:
        """Its state; FORGOTTEN two seconds after its end."""
        with contextlib.suppress(ClusterError):
            command = ("squeue", "--noheader", "--states=all", f"--jobs={self.jobs[name].job}", "--format=%T")
            return self.cluster.command(*command).strip() or "FORGOTTEN"
        return "FORGOTTEN"

    def wait_for(self, name: str, state: str) -> str:
        """Wait until a job is in a state, or over, and return its id."""
        wait_until(lambda: self.state(name) in (state, "FORGOTTEN"), 30, lambda: f"{name}: {self.state(name)}")
        return self.jobs[name].job


@pytest.fixture(scope="module")
def stubs(slurm_is_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stubs]:
    try:
        check_programs(accounting=True)
    except ClusterError as missing:
        if os.environ.get("LOCKSTEP_REQUIRE_SLURM"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("a")
    try:
        check_cgroups(folder)
        has_cgroups = True
    except ClusterError:
        has_cgroups = False
    with Cluster.up(
        folder / "c",
        nodes=5,
        cpus=2,
        memory=2000,
        partitions=["debug PreemptMode=OFF", "low PreemptMode=REQUEUE", "gone PreemptMode=CANCEL", "high PriorityTier=10"],
        options=[
            *("MinJobAge=2", "SlurmdTimeout=5", "MessageTimeout=2", "KillWait=1"),
            *("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE"),
        ],
        accounting=True,
        cgroups=has_cgroups,
    ) as cluster:
        yield Stubs(cluster, folder / "runs", has_cgroups)


def test_cgroups_that_cannot_be_had_are_refused(stubs: Stubs, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="this user cannot create a cgroup with a memory limit below"):
        check_cgroups(tmp_path / "c", root=tmp_path)
    if stubs.has_cgroups:
        with pytest.raises(ClusterError, match=f"the cluster in {stubs.cluster.folder} uses cgroups already"):
            check_cgroups(tmp_path / "c")


@pytest.fixture(scope="module")
def ending(stubs: Stubs) -> list[str]:
    """Jobs that end in each way, within half a minute.

    The database and slurmdbd are killed meanwhile: slurmctld keeps what it cannot send.
    """
    slurm = stubs.cluster.command
    stubs.submit("late", "sleep 90", "--time=5")
    stubs.submit("lost", "sleep 90", "--nodelist=n5", "--no-requeue")
    stubs.submit("preempted", "sleep 90", "--nodelist=n4", "--exclusive", "--partition=gone")
    script = '[ -n "$SLURM_RESTART_COUNT" ] || sleep 90'
    stubs.submit("requeued.finished", script, "--nodelist=n3", "--exclusive", "--partition=low", "--requeue")
    if stubs.has_cgroups:
        stubs.submit("memory", "srun tail /dev/zero; exit 1", "--mem=50", "--nodelist=n1")
    stubs.submit("finished", "exit 0")
    failed = stubs.submit("failed", "exit 3")
    stubs.submit("cancelled", "sleep 90")
    held = stubs.submit("held", "exit 0", "--hold")
    stubs.submit("depends", "exit 0", f"--dependency=afterok:{failed}", "--kill-on-invalid-dep=yes")
    array = stubs.submit("array.finished", "[ $SLURM_ARRAY_TASK_ID != 2 ] || sleep 90; exit $SLURM_ARRAY_TASK_ID", runs=3)
    if stubs.has_cgroups:
        stubs.wait_for("memory", "FAILED")  # before the database is away
    late = stubs.wait_for("late", "RUNNING")
    slurm("scontrol", "update", f"JobId={late}", "EndTime=now")  # seen within 30 s
    for name in ("preempted", "requeued.finished", "lost", "cancelled"):
        stubs.wait_for(name, "RUNNING")
    for node in ("n3", "n4"):
        slurm("sbatch", "--output=/dev/null", "--partition=high", "--exclusive", f"--nodelist={node}", "--wrap=true")
    stubs.cluster.lose("n5")
    stubs.cluster.restore("n5")
    wait_until(lambda: f"{array}_2 RUNNING" in slurm("squeue", "--noheader", "--format=%i %T"))
    slurm("scancel", stubs.jobs["cancelled"].job, held, f"{array}_2")
    stubs.wait_for("requeued.finished", "COMPLETED")  # Slurm starts it again after six seconds
    for part in ("mariadb", "slurmdbd"):
        stubs.cluster.lose(part)
        assert stubs.cluster.dead_parts() == [part]
        with pytest.raises(ClusterError, match="sacct"):
            slurm("sacct")
        if part == "slurmdbd":
            stubs.submit("meanwhile", "exit 7")
            stubs.wait_for("meanwhile", "FAILED")
        stubs.cluster.restore(part)
    return list(stubs.jobs)


@pytest.fixture(scope="module")
def limits(stubs: Stubs, ending: list[str]) -> None:
    """An account with limits of its own and of its user, and two QOS; a job of each runs or waits."""
    add = ("sacctmgr", "--immediate", "--quiet", "add")
    stubs.cluster.command(*add, "qos", "small", "MaxWall=10", "MaxTRESPerJob=node=1", "GrpTRES=cpu=4", "MaxJobsPerUser=1")
    stubs.cluster.command(*add, "qos", "two", "MaxTRESPerUser=cpu=1")
    stubs.cluster.command(*add, "qos", "wide", "MaxTRESPerJob=cpu=9")
    limits = ("MaxWall=5", "MaxTRESPerJob=cpu=1", "MaxSubmitJobs=2", "GrpTRES=node=1")
    stubs.cluster.command(*add, "account", "tiny", *limits)
    user = stubs.cluster.command("id", "--user", "--name").strip()
    stubs.cluster.command(*add, "user", user, "account=tiny", "qos=normal,small,two,wide")
    stubs.cluster.command("sacctmgr", "--immediate", "modify", "user", user, "where", "account=lockstep", "set", "qos+=small")
    stubs.submit("tiny", "sleep 90", "--account=tiny", "--time=3")
    stubs.submit("small", "sleep 90", "--qos=small", "--time=3")
    stubs.wait_for("tiny", "RUNNING")
    stubs.wait_for("small", "RUNNING")


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(
    ("flags", "nodes", "runs", "message"),
    [
        ({"account": "tinny"}, 1, 1, "account: 'tinny' is not an account of "),
        ({"account": "tinny"}, 1, 1, "did you mean 'tiny'?"),
        ({"qos": "smal"}, 1, 1, "in account lockstep; did you mean 'small' or 'normal'?"),
        ({"qos": "two"}, 1, 1, "in account lockstep; valid are normal, small."),
        ({"account": "tiny", "time": "10"}, 1, 1, "time: 10 exceeds MaxWall=5 of user "),
        ({"account": "tiny", "qos": "small", "time": "11"}, 1, 1, "exceeds MaxWall=10 of QOS small (minutes): the job would"),
        ({"account": "TINY", "qos": "wide"}, 2, 1, "nodes: 2 nodes exceed GrpTRES=node=1 of account tiny: the job would never"),
        ({"sbatch": ("--account=tiny",), "cpus_per_rank": 2}, 1, 1, "cpus_per_rank: 2 CPUs exceed MaxTRESPerJob=cpu=1 of user"),
        (
            {"account": "tiny", "qos": "two", "cpus_per_rank": 2},
            1,
            1,
            "cpus_per_rank: 2 CPUs exceed MaxTRESPerUser=cpu=1 of QOS",
        ),
        ({"qos": "small"}, 2, 1, "nodes: 2 nodes exceed MaxTRESPerJob=node=1 of QOS small"),
        ({"account": "tiny"}, 1, 3, "does not allow a sweep of 3 runs, as it has 1 job now; wait until"),
    ],
)
def test_limits_and_mistakes_are_told_before_submission(
    stubs: Stubs, tmp_path: Path, flags: dict[str, object], nodes: int, runs: int, message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        check_schedulable(request_of(tmp_path, nodes, runs, **flags), stubs.env)
    assert message in refused.value.message


def request_of(folder: Path, nodes: int = 1, runs: int = 1, **flags: object) -> JobRequest:
    profile = Profile(**{"cpus_per_rank": 1} | flags)  # type: ignore[arg-type]
    code = CodePaths((folder,), None, "")
    return JobRequest("x", folder, code, profile, LaunchOptions(folder, nodes=NodeRange(nodes, nodes)), runs)


@pytest.mark.usefixtures("limits")
def test_a_job_that_must_wait_for_a_limit_is_told_so(stubs: Stubs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_schedulable(request_of(tmp_path), stubs.env)
    assert capsys.readouterr().err == ""
    check_schedulable(request_of(tmp_path, qos="small"), stubs.env)
    assert capsys.readouterr().err == "The job will wait: MaxJobsPerUser=1 of QOS small, which has 1 job now.\n"
    check_schedulable(request_of(tmp_path, account="tiny"), stubs.env)
    told = "The job will wait: GrpTRES=node=1 of account tiny, of which 1 are in use, and it asks for 1.\n"
    assert capsys.readouterr().err == told


@pytest.fixture(scope="module")
def forgotten(stubs: Stubs, ending: list[str]) -> dict[str, list[RunStatus]]:
    """The status of the runs of these jobs, once slurmctld does not know the jobs any more."""
    jobs = [stubs.jobs[name] for name in ending]

    def known() -> set[str]:
        return set(stubs.cluster.command("squeue", "--noheader", "--states=all", "--format=%F").split()) & {j.job for j in jobs}

    wait_until(lambda: not known(), 60, known)
    assert not list(stubs.folder.rglob("*.ended.json"))
    return {name: query_status([job], stubs.env) for name, job in zip(ending, jobs, strict=True)}


@pytest.mark.parametrize(
    ("name", "exit_status", "state", "message"),
    [
        ("finished", 0, "finished", ""),
        ("failed", 1, "failed", "exit status 3"),
        ("meanwhile", 1, "failed", "exit status 7"),
        ("cancelled", 4, "cancelled", ""),
        ("held", 4, "cancelled", ""),
        ("depends", 4, "cancelled", "The job that it waited for did not succeed."),
        ("late", 5, "over its time limit", "--time"),
        ("memory", 6, "out of memory", "more memory than it requested; request more with --mem."),
        ("lost", 7, "a node failed", "A node of n5 was lost."),
        ("preempted", 7, "preempted", "has not requeued it"),
        ("requeued.finished", 0, "finished", ""),
    ],
)
def test_a_job_that_slurm_has_forgotten_is_told(
    stubs: Stubs, forgotten: dict[str, list[RunStatus]], name: str, exit_status: int, state: str, message: str
) -> None:
    if name == "memory" and not stubs.has_cgroups:
        pytest.skip("this machine allows no cgroups, so no job is OUT_OF_MEMORY")
    (status,) = forgotten[name]
    assert status.slurm is not None, status
    assert (status.exit_status, status.state) == (exit_status, state), (status.slurm, status.message)
    assert message in status.message and status.slurm.restarts == ("requeued" in name)


def test_each_run_of_an_array_is_told(forgotten: dict[str, list[RunStatus]]) -> None:
    runs = forgotten["array.finished"]
    assert [(run.exit_status, run.state) for run in runs] == [(0, "finished"), (1, "failed"), (4, "cancelled")]
    assert [run.slurm.exit_status for run in runs if run.slurm is not None][:2] == [0, 1]


def test_a_job_may_wait_for_one_that_slurm_has_forgotten(stubs: Stubs, forgotten: dict[str, list[RunStatus]]) -> None:
    array = stubs.jobs["array.finished"].job
    assert accounted_states(array, stubs.env) == {"COMPLETED", "FAILED", "CANCELLED"}
    assert accounted_states(f"{array}_1", stubs.env) == {"FAILED"}
    check_dependency(Dependency.on("afterok", stubs.jobs["finished"].job), 1, stubs.env)
    with pytest.raises(UsageError, match=r"did not finish successfully \(FAILED\)"):
        check_dependency(Dependency.on("afterok", stubs.jobs["failed"].job), 1, stubs.env)


def test_the_cluster_binds_tasks_and_leaves_nothing(stubs: Stubs) -> None:
    """Last, as it ends the cluster of these tests."""
    cluster = stubs.cluster
    if binds_cpus(cluster.spec):
        assert cluster.command("srun", "--quiet", "--cpus-per-task=1", "nproc") == "1\n"
    for part in ("mariadb", "slurmdbd"):
        cluster.lose(part)
    with pytest.raises(ClusterError, match="restore mariadb first"):
        cluster.restore("slurmdbd")
    cluster.down()
    assert not cluster.processes() and not cluster.folder.exists()
    assert not list(Path("/sys/fs/cgroup").glob("*/slurm_n*"))
