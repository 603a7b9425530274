"""slurm/cluster.py with real Slurm daemons: rejected arguments, starting, stopping, and lost nodes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import REPO
from support.waiting import wait_until

from lockstep.slurm.cluster import Cluster, ClusterError
from lockstep.slurm.cluster.conf import free_ports

pytestmark = pytest.mark.usefixtures("slurm_is_here")
SCRIPT = REPO / "slurm" / "cluster.py"


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder for clusters with a short path, as their sockets need; clusters in it are stopped at the end."""
    place = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        yield place
    finally:
        for folder in place.iterdir():
            if there := Cluster.find(folder):
                there.down()
        shutil.rmtree(place)


def cli(*argv: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the script as a person does."""
    command = [sys.executable, str(SCRIPT), *argv]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=50)


def alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def job(there: Cluster, number: str, field: str) -> str:
    """One field of a job, as scontrol shows it."""
    shown = there.command("scontrol", "--oneliner", "show", "job", number)
    found = re.search(rf"\b{field}=(\S*)", shown)
    assert found, shown
    return found[1]


def submit(there: Cluster, script: str, *options: str, output: Path | str = "/dev/null") -> str:
    """Submit a job, wait until it runs, and return its number."""
    number = there.command("sbatch", "--parsable", f"--output={output}", *options, f"--wrap={script}").strip()
    wait_until(lambda: job(there, number, "JobState") == "RUNNING")
    return number


def test_the_tests_of_a_cluster_run_on_one_worker(request: pytest.FixtureRequest) -> None:
    # Where pytest-xdist does not see the groups, as with pytest 9.2, each worker has a cluster, and imports DeepSpeed.
    assert request.node.nodeid.endswith("@slurm") or "PYTEST_XDIST_WORKER" not in os.environ


def test_a_foreign_folder_is_rejected_and_kept(place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").touch()
    for action in ("up", "down", "status"):
        refused = cli(action, "--folder", str(place / "mine"))
        assert refused.returncode == 1
        assert "is not a cluster's folder" in refused.stderr
    assert (place / "mine" / "thesis.tex").exists()
    shutil.rmtree(place / "mine")


def test_a_path_that_is_too_long_for_a_socket_is_rejected(place: Path) -> None:
    with pytest.raises(ClusterError, match=r"is too long for the sockets in it: --folder may have \d+ bytes\.$"):
        Cluster.up(place / ("long" * 30))


def test_missing_programs_are_named_with_the_command_that_installs_them(place: Path) -> None:
    refused = cli("up", "--folder", str(place / "c"), PATH="")
    assert refused.returncode == 1
    assert re.search(r"Slurm is missing on this machine \(.*srun\); .* apt-get install slurmctld slurmd", refused.stderr)
    assert not (place / "c").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("up", "--nodes", "0"), "--nodes: 0 must be 1 or more"),
        (("up", "--option", "Fast"), "'Fast' must be Key=Value"),
        (("run", "--nodes", "1"), "run needs a COMMAND after --"),
        (("down", "--", "true"), "down takes no command"),
    ],
)
def test_a_usage_error_is_one_sentence(place: Path, argv: tuple[str, ...], words: str) -> None:
    refused = cli(argv[0], "--folder", str(place / "c"), *argv[1:])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert words in refused.stderr


def test_an_option_that_slurm_does_not_know_leaves_nothing_behind(place: Path) -> None:
    with pytest.raises(ClusterError, match=r"slurmctld failed: .*Speed"):
        Cluster.up(place / "c", nodes=1, options=["Speed=high"])
    assert not (place / "c").exists()


def test_each_node_is_idle_and_runs_tasks(place: Path) -> None:
    with Cluster.up(place / "c", nodes=3, cpus=64, options=["KillWait=77"]) as there:
        assert there.node_states() == {"n1": "idle", "n2": "idle", "n3": "idle"}
        names = there.command("srun", "--nodes=3", "--cpus-per-task=64", "sh", "-c", "echo $SLURMD_NODENAME")
        assert sorted(names.split()) == ["n1", "n2", "n3"]
        assert re.search(r"KillWait += 77 sec", there.command("scontrol", "show", "config"))
        with pytest.raises(ClusterError, match="Invalid partition"):
            there.command("srun", "--partition=nosuch", "true")
    assert not (place / "c").exists()


def test_two_clusters_see_only_their_own_jobs(place: Path) -> None:
    with Cluster.up(place / "a", nodes=1) as one, Cluster.up(place / "b", nodes=1) as other:
        submit(one, "sleep 60")
        wait_until(one.job_processes)
        assert not other.job_processes()
        assert one.command("squeue", "--noheader") and not other.command("squeue", "--noheader")
        other.down()
        assert one.node_states() == {"n1": "mixed"}


def test_gpus_are_counted(place: Path) -> None:
    with Cluster.up(place / "c", nodes=1, gpus=4) as there:
        submit(there, "sleep 60", "--gpus-per-node=2")
        assert there.command("srun", "--gpus-per-node=2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES") == "2,3\n"
        with pytest.raises(ClusterError, match="Unable to allocate resources"):
            there.command("srun", "--immediate=1", "--gpus-per-node=3", "true")


def test_a_job_that_exceeds_its_memory_is_killed(place: Path) -> None:
    with Cluster.up(place / "c", nodes=1) as there:
        eater = "import time; block = bytearray(b'x' * 200_000_000); time.sleep(30)"
        number = submit(there, f'{sys.executable} -c "{eater}"', "--mem=50", output=place / "c" / "out")
        wait_until(lambda: job(there, number, "JobState") == "FAILED")
        assert "exceeded memory limit" in (place / "c" / "out").read_text()


def test_preemption_requeues_a_job_of_low_priority(place: Path) -> None:
    preemption = ["PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE"]
    with Cluster.up(place / "c", nodes=1, partitions=["low", "high PriorityTier=10"], options=preemption) as there:
        low = submit(there, "sleep 60", "--exclusive")
        submit(there, "sleep 60", "--exclusive", "--partition=high")
        assert (job(there, low, "JobState"), job(there, low, "Restarts")) == ("PENDING", "1")


def test_a_port_that_was_taken_meanwhile_is_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        tries = [lambda count: [*free_ports(count - 1), busy.getsockname()[1]], free_ports]
        monkeypatch.setattr("lockstep.slurm.cluster.daemons.free_ports", lambda count: tries.pop(0)(count))
        with Cluster.up(place / "c", nodes=1) as there:
            assert there.node_states() == {"n1": "idle"}
    assert not tries


def test_up_prints_the_export_line_and_finds_a_running_cluster(place: Path) -> None:
    asked = ("--folder", str(place / "c"), "--nodes", "1")
    first, again = cli("up", *asked), cli("up", *asked)
    assert first.stdout == again.stdout == f"export SLURM_CONF={place}/c/slurm.conf\n"
    assert "already up" in again.stderr
    other = cli("up", *asked[:2], "--nodes", "2")
    assert (other.returncode, other.stdout) == (1, "")
    assert "has nodes 1, not 2; run `down` first" in other.stderr
    status = cli("status", *asked[:2])
    assert status.returncode == 0
    assert re.search(r"^n1 +pid \d+ +port \d+ +idle$", status.stdout, re.MULTILINE)
    assert cli("down", *asked[:2]).returncode == 0
    assert cli("status", *asked[:2]).returncode == 1
    assert cli("down", *asked[:2]).returncode == 0
    assert not (place / "c").exists()


def test_run_returns_the_status_of_its_command_and_stops_the_cluster(place: Path) -> None:
    run = ("run", "--folder", str(place / "c"), "--nodes", "1", "--")
    done = cli(*run, "sh", "-c", "env | grep -E '^S(LURM|BATCH)'; srun sh -c 'exit 7'", SBATCH_PARTITION="x", SLURM_NTASKS="9")
    assert (done.returncode, done.stdout) == (7, f"SLURM_CONF={place}/c/slurm.conf\n")
    assert not (place / "c").exists()
    assert cli(*run, "sh", "-c", "kill -9 $$").returncode == 137
    assert cli(*run, "nosuch").returncode == 127
    assert not (place / "c").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_stops_the_cluster_when_it_is_interrupted(place: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(SCRIPT), "run", "--folder", str(place / "c"), "--nodes", "1", "--"]
    script = "trap 'echo asked; exit 5' INT TERM; echo up; while :; do sleep 0.1; done"
    with subprocess.Popen([*command, "sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "up\n"
        if number == signal.SIGINT:
            os.killpg(run.pid, number)  # as a terminal does
        else:
            run.send_signal(number)
        assert run.stdout.read() == "asked\n"
    assert run.returncode == 5
    assert not (place / "c").exists()


@pytest.mark.parametrize("victims", [(), ("slurmctld",), ("slurmd",), ("munged", "slurmctld", "slurmd", "slurmstepd")])
def test_down_leaves_nothing_behind(place: Path, victims: tuple[str, ...]) -> None:
    there = Cluster.up(place / "c", nodes=2)
    outside = subprocess.Popen(["srun", "--quiet", "sleep", "60"], env=os.environ | there.env, stderr=subprocess.DEVNULL)
    submit(there, "srun sleep 60", "--nodes=2")
    wait_until(lambda: len(there.job_processes()) >= 10)
    before = there.processes()
    for process in before:
        if process.program in victims:
            os.kill(process.pid, signal.SIGKILL)
    assert cli("down", "--folder", str(there.folder)).returncode == 0
    assert outside.wait(timeout=5) != 0
    assert not [process for process in before if alive(process.pid)]
    assert not there.processes()
    assert not there.folder.exists()


def test_down_names_the_jobs_and_asks_on_a_terminal(place: Path) -> None:
    with Cluster.up(place / "c", nodes=1) as there:
        submit(there, "sleep 60", "--job-name=mine")
        wait_until(there.job_processes)
        for answer, status in (("n", 1), ("y", 0)):
            ours, theirs = os.openpty()
            os.write(ours, f"{answer}\n".encode())
            command = [sys.executable, str(SCRIPT), "down", "--folder", str(there.folder)]
            done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=50)
            os.close(ours)
            os.close(theirs)
            assert re.search(r"1 job will be cancelled: \d+ \(mine of ", done.stderr)
            assert (done.returncode, Cluster.find(there.folder) is None) == (status, answer == "y"), done.stderr


def test_down_kills_no_other_process(place: Path) -> None:
    there = Cluster.up(place / "c", nodes=1)
    for process in there.processes():
        os.kill(process.pid, signal.SIGKILL)
    # Its pid is in a stale pid file, its cwd is in the cluster's folder, and it has the environment of a shell, not of a job.
    environment = os.environ | there.env | {"SLURM_JOB_ID": "1"}
    with subprocess.Popen(["sleep", "60"], cwd=there.folder / "n1", env=environment) as innocent:
        for pid_file in there.folder.glob("*/pid"):
            pid_file.write_text(f"{innocent.pid}\n")
        (there.folder / "lockstep-cluster.json").write_text('{"spec": {')  # a crash while it was written
        assert cli("down", "--folder", str(there.folder)).returncode == 0
        assert innocent.poll() is None
        innocent.kill()
    assert not there.folder.exists()


def test_down_finds_the_processes_of_a_deleted_folder(place: Path) -> None:
    there = Cluster.up(place / "c", nodes=1)
    submit(there, "sleep 60")
    wait_until(there.job_processes)
    shutil.rmtree(there.folder)
    assert cli("down", "--folder", str(there.folder)).returncode == 0
    assert not there.processes()


def test_down_from_inside_a_job_is_rejected(place: Path) -> None:
    with Cluster.up(place / "c", nodes=1) as there:
        with pytest.raises(ClusterError, match="this is a job of the cluster"):
            there.command("srun", sys.executable, str(SCRIPT), "down", "--folder", str(there.folder))
        assert not there.dead_parts()


def test_a_lost_node_loses_its_processes_and_can_be_restored(place: Path) -> None:
    with Cluster.up(place / "c", nodes=2) as there:
        number = submit(there, "srun sleep 60", "--nodes=2", "--requeue")
        fatal = submit(there, "sleep 60", "--nodelist=n2", "--no-requeue")
        wait_until(lambda: {process.part for process in there.processes() if process.program == "job"} == {"n1", "n2"})
        there.lose("n2")
        assert "n2" not in {process.part for process in there.processes()}
        status = cli("status", "--folder", str(there.folder))
        assert (status.returncode, "n2 is dead" in status.stderr) == (1, True)
        there.restore("n2")
        wait_until(lambda: job(there, number, "Restarts") == "1")
        wait_until(lambda: job(there, fatal, "JobState") == "NODE_FAIL")
        wait_until(lambda: job(there, number, "JobState") == "RUNNING")
        with pytest.raises(ClusterError, match="n2 is not lost"):
            there.restore("n2")


def test_a_lost_node_is_noticed(place: Path) -> None:
    with Cluster.up(place / "c", nodes=1, options=["SlurmdTimeout=2", "MessageTimeout=2"]) as there:
        there.lose("n1")
        wait_until(lambda: there.node_states()["n1"].startswith("down"), seconds=40)
        there.restore("n1")
        assert there.node_states() == {"n1": "idle"}
