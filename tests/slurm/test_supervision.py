"""The batch script and its supervisor on the one-machine cluster, with a task that does not import torch.

Jobs of one run that are released at once, jobs in containers, then the runs of a sweep.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.runs import REPO
from support.stub_task import StubTask
from support.waiting import wait_until

from lockstep.runs import CodePaths, Owner, Run, RunResult, read_attempts
from lockstep.slurm import member_runs
from lockstep.slurm.cluster import Cluster
from lockstep.slurm.submission.batch_script import JobRequest
from lockstep.slurm.submission.options import LaunchOptions
from lockstep.slurm.submission.profile import Container, Profile
from lockstep.slurm.submission.sbatch import scrub_environment, submit_job

pytestmark = pytest.mark.timeout(250)  # requeued jobs wait for some seconds

PROFILE = Profile(time="30", ranks_per_node=2, cpus_per_rank=1, mem="1000", partition="low")


class Jobs:
    """Submits stub tasks; at the end its jobs are cancelled."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.ids: list[str] = []

    def submit(self, runs: Sequence[Run], profile: Profile = PROFILE) -> str:
        """Submit a job for one run, or an array for several, and return its id."""
        code = CodePaths((REPO / "tests", REPO / "src"), None, "")
        folder = runs[0].folder if len(runs) == 1 else runs[0].folder.with_name("sweep")
        request = JobRequest("stub", folder, code, profile, LaunchOptions(self.folder), len(runs))
        self.ids.append(
            submit_job(request, [StubTask(run.folder, folder / "slurm", "fit", (), "", 2, None) for run in runs], os.environ)
        )
        return self.ids[-1]

    def queue(self, format_: str = "%F_%K %T %N") -> list[str]:
        """One line per job that has not ended."""
        return self.cluster.command("squeue", "--array", "--noheader", f"--format={format_}").splitlines()

    def wait_until_ended(self) -> None:
        wait_until(lambda: not self.queue("%F"), 60, self.queue)


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    with monkeypatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "SBATCH_")):
                patch.delenv(name)
        for name, value in cluster.env.items():
            patch.setenv(name, value)
        scrub_environment(os.environ)
        yield (made := Jobs(cluster, tmp_path))
        if left := set(made.queue("%F")) & set(made.ids):
            cluster.command("scancel", *left)


def new_run(folder: Path, name: str) -> Run:
    return Run.create(folder, "x", name)


def wait_for_start(run: Run, attempt: int) -> None:
    """Wait until an attempt has started."""
    started = run.folder / f"{attempt}.started"
    wait_until(lambda: started.exists() and started.read_text(), 60, lambda: describe(run))


def wait_for_end(run: Run, attempt: int) -> None:
    """Wait until an attempt has ended."""
    wait_until(lambda: attempt in {ended.attempt for ended in read_attempts(run)}, 60, lambda: describe(run))


def describe(run: Run) -> str:
    """Attempts of a run, and the output of its job."""
    outputs = [path.read_text() for path in run.folder.parent.glob("*/slurm/*_0_log.out")]
    return f"{run.folder.name}: {read_attempts(run)} {outputs}"


def do(run: Run, word: str) -> int:
    """Tell the newest attempt what to do, and return its number."""
    attempt = run.newest_attempt
    (run.folder / f"{attempt}-{word}").touch()
    return attempt


def finish(run: Run) -> None:
    do(run, "finish")
    wait_until(lambda: (result := RunResult.read(run.result)) is not None and result.is_finished, 30, lambda: describe(run))


def test_of_two_jobs_of_a_run_that_are_released_at_once_one_trains(jobs: Jobs, tmp_path: Path) -> None:
    run = new_run(tmp_path, "one")
    held = Profile(time="30", ranks_per_node=2, cpus_per_rank=1, mem="1000", sbatch=("--hold",))
    ids = [jobs.submit([run], held) for _ in range(2)]
    jobs.cluster.command("scontrol", "release", *ids)
    wait_for_start(run, 1)
    refused = wait_until(lambda: list(run.folder.glob("slurm/*.exit")), 60, lambda: describe(run))
    assert [path.read_text() for path in refused] == ["2\n"]
    (winner,) = set(ids) - {refused[0].stem}
    assert f"is being trained by job {winner}; end that first" in describe(run)
    finish(run)
    jobs.wait_until_ended()
    assert run.newest_attempt == 1 and (run.folder / "slurm" / f"{winner}.exit").read_text() == "0\n"


APPTAINER = """#!/bin/bash
[ "$1" = exec ] || exit 9
shift
while :; do
  case $1 in
    --nv) shift ;;
    --bind | --pwd) shift 2 ;;
    *) break ;;
  esac
done
PATH=$1/bin exec "${@:2}"
"""
"""A stand-in for apptainer: the image is a folder, whose bin is the PATH."""

SRUN = """#!/bin/bash
for argument in "$@"; do
  case $argument in
    --container-image=*) image=${argument#*=} ;;
    --container-*) ;;
    *) kept+=("$argument") ;;
  esac
done
# The command begins at the first Python.
for ((i = 0; i < ${#kept[@]}; i++)); do [ "${kept[i]}" = python ] && break; done
exec @srun@ "${kept[@]:0:i}" env PATH="$image/bin" "${kept[@]:i}"
"""
"""A stand-in for srun with pyxis."""


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_job_in_an_image_without_slurm_is_claimed_restarted_and_finished(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    image, host = tmp_path / "image", tmp_path / "host"
    (image / "bin").mkdir(parents=True)
    host.mkdir()
    (image / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for name, text in (("apptainer", APPTAINER), ("srun", SRUN.replace("@srun@", str(shutil.which("srun"))))):
        if runtime == "apptainer" or name == "srun":
            (host / name).write_text(text)
    if runtime == "apptainer":
        (host / "srun").unlink()
    for path in (*host.iterdir(), image / "bin" / "python"):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{host}:{os.environ['PATH']}")
    run = new_run(tmp_path, runtime)
    run.claim_attempt(Owner(job="999999"))  # of a job that has ended long ago
    container = Container(str(image), runtime="pyxis" if runtime == "pyxis" else "apptainer")
    job = jobs.submit([run], Profile(time="30", ranks_per_node=2, cpus_per_rank=1, mem="1000", container=container))
    wait_for_start(run, 2)
    ends = float((run.folder / "2.started").read_text())
    assert time.time() < ends < time.time() + 1900
    do(run, "crash")
    wait_for_start(run, 3)
    finish(run)
    jobs.wait_until_ended()
    assert (run.folder / "slurm" / f"{job}.exit").read_text() == "0\n"
    assert [(attempt.attempt, attempt.job, attempt.crashed) for attempt in read_attempts(run)] == [
        (2, job, True),
        (3, job, False),
    ]


def test_a_fault_of_a_run_of_a_sweep_reaches_no_other_run(jobs: Jobs, tmp_path: Path) -> None:
    """The last run is the one whose own job id is that of the whole array."""
    new_run(tmp_path, "sweep")
    runs = [new_run(tmp_path, run.folder.name) for run in member_runs(tmp_path / "x" / "sweep", 3)]
    array = jobs.submit(runs, Profile(time="30", ranks_per_node=2, cpus_per_rank=2, mem="1000", partition="low"))

    def attempts() -> list[int]:
        return [run.newest_attempt for run in runs]

    for run in runs:
        wait_for_start(run, 1)
        assert time.time() < float((run.folder / "1.started").read_text()) < time.time() + 1900
    for fault in ("crash", "stop", "preempt"):
        for index in (2, 0, 1):
            expected = attempts()
            if fault == "preempt":
                (node,) = (line.split()[2] for line in jobs.queue() if line.startswith(f"{array}_{index} "))
                options = ("--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null")
                jobs.ids.append(jobs.cluster.command("sbatch", "--parsable", *options, "--wrap=sleep 2").strip())
            else:
                do(runs[index], fault)
            wait_for_end(runs[index], expected[index])
            if fault == "crash":
                expected[index] += 1
                wait_for_start(runs[index], expected[index])
                assert attempts() == expected
        for run in runs:
            wait_for_start(run, 1 + len(read_attempts(run)))
    assert attempts() == [4, 4, 4]
    restarts = jobs.cluster.command("squeue", "--array", "--noheader", f"--jobs={array}", "--Format=RestartCnt").split()
    assert restarts == ["2", "2", "2"]
    for run in runs:
        finish(run)
    jobs.wait_until_ended()
    for index, run in enumerate(runs):
        ended = read_attempts(run)
        assert [attempt.job for attempt in ended] == [f"{array}_{index}"] * 4
        assert [(attempt.crashed, attempt.preempted) for attempt in ended] == [
            *((True, False), (False, False), (False, True), (False, False))
        ]
