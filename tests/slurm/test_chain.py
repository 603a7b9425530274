"""Chains of jobs, ``--then``: what is sent to Slurm, then jobs on the one-machine cluster, most with a task without torch."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from support.configs import DIGITS
from support.runs import REPO
from support.slurm_jobs import Shell, login_environment
from support.stub_task import StubTask
from support.waiting import wait_until

from lockstep.cli import jobs, submit
from lockstep.compat.submitit import load_task
from lockstep.core import UsageError
from lockstep.runs import CodePaths, LaunchRecord, Run, RunResult
from lockstep.slurm import RunStatus, SubmittedJob, find_job, query_status, register_job, registered_jobs
from lockstep.slurm.cluster import Cluster, ClusterError
from lockstep.slurm.submission import Chain, LaunchOptions, NodeRange, Profile, Submission, submission
from lockstep.slurm.submission.chain import _undone
from lockstep.slurm.submission.submission import Queued

pytestmark = pytest.mark.timeout(150)


def test_each_link_has_resources_keys_and_a_script_of_its_own(tmp_path: Path) -> None:
    profile = Profile(time="60", ranks_per_node=2, nodelist="n1,n2,n3,n4", sbatch=("--hold", "--comment=x"))
    options = LaunchOptions(tmp_path, nodes=NodeRange(4, 4))
    training = Submission.create([*DIGITS, f"--run.root={tmp_path}", "--seed_everything=true"], profile, options, {})
    texts = ["validate", "test --nodes 2 --time 10 --data.batch_size 8", "export --part network --job-name out"]
    chain = Chain.create(training, [submit.parse_link(text, profile) for text in texts], {})
    scripts = chain.preview({}).split("# --then")
    assert [[line for line in script.splitlines() if "-nodes=" in line or "--time=" in line] for script in scripts] == [
        ["#SBATCH --nodes=4", "#SBATCH --time=60"],
        ["#SBATCH --nodes=1", "#SBATCH --time=60"],
        ["#SBATCH --nodes=2", "#SBATCH --time=10"],
        ["#SBATCH --nodes=1", "#SBATCH --time=60"],
    ]
    assert [("--hold" in script, "--nodelist" in script, "--comment=x" in script) for script in scripts] == [
        (True, True, True),
        *[(False, False, True)] * 3,
    ]
    for script, before in zip(scripts[1:], ("FIT", "VALIDATE", "TEST"), strict=True):
        assert f"--dependency=afterok:{before}\n#SBATCH --kill-on-invalid-dep=yes" in script
    assert f" --data.batch_size 8 --ckpt_path={training.folder} --seed_everything={training.drawn_seed}\n" in scripts[2]
    assert f": export {training.folder} --out=weights.safetensors --part=network\n" in scripts[3]
    assert [link.job_name for link in chain.links] == ["digits-validate", "digits-test", "out"]
    assert [link.command for link in chain.with_own_keys] == ["test"]
    assert not list(tmp_path.iterdir())


def test_all_jobs_of_a_chain_are_cancelled_also_if_a_folder_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/cancelled\n')
    (tmp_path / "scancel").chmod(0o755)
    runs = [Run.create(tmp_path / "runs", f"x{number}") for number in range(2)]
    folders = [run.folder for run in runs]
    queued = [
        Queued(
            SubmittedJob(str(number), run.folder, "x", 1, ""),
            CodePaths((), (tmp_path, tmp_path), ""),
            [run],
            [run.folder.parent],
        )
        for number, run in enumerate(runs)
    ]
    remove = shutil.rmtree

    def refuse(folder: Path) -> None:
        if folder == folders[1]:
            raise OSError(5, "Input/output error")
        remove(folder)

    monkeypatch.setattr(submission.shutil, "rmtree", refuse)
    cause = UsageError("no.")
    assert (
        str(_undone(queued, cause, {"PATH": f"{tmp_path}:/bin"}))
        == "no. What was queued before (0, 1) is cancelled and removed."
    )
    assert (tmp_path / "cancelled").read_text() == "1\n0\n"
    assert not folders[0].parent.exists() and folders[1].exists()
    assert f"{folders[1]} cannot be removed (Input/output error); remove it yourself" in caplog.text


def test_a_chain_is_one_submission_of_the_registry(tmp_path: Path) -> None:
    (tmp_path / "squeue").write_text("#!/bin/sh\n")  # Slurm has forgotten all
    (tmp_path / "squeue").chmod(0o755)
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/bin"}
    links = [SubmittedJob(str(number), Run.create(tmp_path, "x").folder, "x", 1, "") for number in range(3)]
    register_job(replace(links[0], then=tuple(replace(link, command="test") for link in links[1:])), env)
    (chain,) = registered_jobs(env)
    assert [link.job for link in chain.links] == ["0", "1", "2"] and find_job(links[0].folder.name, env).then == chain.then
    assert [link.job for link in find_job("1", env).links] == ["1", "2"] and find_job(str(links[2].folder), env).job == "2"
    LaunchRecord("", 1, 1, after="afterok:1").write(Run(links[2].folder).launch)
    told = query_status([chain], env)[2]
    assert (told.state, told.exit_status) == ("cancelled", 4)
    assert told.message == "It never started: it was cancelled, or afterok:1 did not happen; Slurm has forgotten which."
    register_job(links[1], env)
    assert [job.is_recycled for job in registered_jobs(env)[0].links] == [False, True, False]


class Chains:
    """Submits chains in this process; at the end their jobs are cancelled."""

    def __init__(self, cluster: Cluster, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.cluster, self.project, self._capsys = cluster, project, capsys
        self.ids: list[str] = []

    def submit(self, *arguments: str) -> SubmittedJob:
        """Submit the config digits, which must succeed."""
        status = submit.main(["--no-snapshot", "--wandb.mode", "disabled", *arguments])
        said = self._capsys.readouterr()
        assert status == 0, said.err
        self.ids += said.out.split()
        chain = find_job(said.out.split()[0], os.environ)
        assert [link.job for link in chain.links] == said.out.split()
        return chain

    def jobs(self, *arguments: str) -> str:
        """What ``lockstep jobs`` prints."""
        jobs.main(arguments)
        said = self._capsys.readouterr()
        return said.out + said.err

    def wait(self, chain: SubmittedJob, *states: str) -> list[RunStatus]:
        """Wait until the runs of a chain are in these states."""
        seen: list[RunStatus] = []

        def reached() -> bool:
            seen[:] = query_status([chain], os.environ)
            return [status.state for status in seen] == list(states)

        wait_until(reached, 60, lambda: [(status.state, status.message) for status in seen], interval=0.2)
        return seen

    def queue(self) -> list[str]:
        """Id and dependency of all jobs of the cluster that have not ended."""
        return self.cluster.command("squeue", "--noheader", "--Format=ArrayJobID:|,Dependency:|").splitlines()


@pytest.fixture
def chains(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Chains]:
    """Chains of stub tasks."""
    project = tmp_path / "project"
    project.mkdir()
    with monkeypatch.context() as patch:
        env = login_environment(cluster, tmp_path) | {"PYTHONPATH": f"{REPO / 'tests'}:{REPO / 'src'}"}
        for name in {*os.environ} - {*env}:
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        patch.chdir(project)
        patch.setattr(submission, "NodeTask", StubTask)
        yield (made := Chains(cluster, project, capsys))
        if left := {line.split("|")[0] for line in made.queue()} & set(made.ids):
            cluster.command("scancel", *left)
            wait_until(lambda: not {line.split("|")[0] for line in made.queue()} & set(made.ids), 20, made.queue)


def start(link: SubmittedJob, attempt: int) -> Run:
    """Wait until an attempt of a link has started."""
    run = Run(link.folder)
    wait_until(lambda: (run.folder / f"{attempt}.started").exists(), 60, lambda: sorted(run.folder.glob("slurm/*")))
    return run


def test_a_chain_waits_for_a_requeued_training_and_is_cancelled_as_one(chains: Chains) -> None:
    chain = chains.submit("--then", "test", "--then", "export")
    fit, test, _ = chain.links
    start(fit, 1)
    assert "\tfit running; test waiting; export waiting\t" in chains.jobs("list")
    told = chains.wait(chain, "running", "waiting", "waiting")
    assert told[1].message == f"It waits for job {fit.job} to finish successfully." and told[2].command == "export"
    assert [line.split() for line in chains.jobs("status").splitlines() if line.startswith("command")] == [
        ["command", "fit"], ["command", "test"], ["command", "export"],
    ]  # fmt: skip
    chains.cluster.command("scontrol", "requeue", fit.job)
    time.sleep(2)  # a node refuses a job that it has killed in the same second, and Slurm 24.11 then ends the job
    run = Run(fit.folder)

    def restarted() -> bool:
        with suppress(ClusterError):  # again and again: Slurm sets a later time once the job has stopped
            chains.cluster.command("scontrol", "update", f"jobid={fit.job}", "StartTime=now")
        return (run.folder / "2.started").exists()

    wait_until(restarted, 60, chains.queue, interval=0.5)
    chains.wait(chain, "running", "waiting", "waiting")
    (run.folder / "2-finish").touch()
    start(test, 1)
    chains.cluster.command("scancel", test.job)  # then Slurm cancels what waits for it
    told = chains.wait(chain, "finished", "cancelled", "cancelled")
    assert told[2].message == f"It waited for afterok:{test.job}, which cannot happen any more."
    assert "\tfit finished; test cancelled; export cancelled\t" in chains.jobs("list")
    assert jobs.follow(chain, os.environ) == 4


def test_a_chain_is_cancelled_as_one(chains: Chains) -> None:
    chain = chains.submit("--sbatch=--hold", "--then", "test", "--then", "export")
    assert f"jobs {', '.join(link.job for link in chain.then)} are cancelled" in chains.jobs("cancel", chain.then[0].job)
    chains.wait(chain, "waiting", "cancelled", "cancelled")
    assert f"job {chain.job} is cancelled" in chains.jobs("cancel", chain.job)
    chains.wait(chain, "cancelled", "cancelled", "cancelled")
    assert chains.jobs("cancel", chain.job) == f"lockstep: job {chain.job} has ended already: cancelled.\n"


def test_each_run_of_a_sweep_has_a_chain_of_its_own(chains: Chains) -> None:
    chain = chains.submit("--sbatch=--hold", "--sweep", "seed_everything=1,2", "--then", "test", "--then", "export")
    fit, test, export = chain.links
    assert {line for line in chains.queue() if line.split("|")[0] in (test.job, export.job)} == {
        f"{test.job}|aftercorr:{fit.job}_*(unfulfilled)|",
        f"{export.job}|aftercorr:{test.job}_*(unfulfilled)|",
    }
    members = [run.folder for _, run in fit.members]
    for number, folder in enumerate(members):
        task = load_task(test.folder / "slurm" / f"{test.job}_{number}_submitted.pkl")
        assert task.folder == test.members[number][1].folder and f"--ckpt_path={folder}" in task.arguments
        assert f"--seed_everything={number + 1}" in task.arguments
        task = load_task(export.folder / "slurm" / f"{export.job}_{number}_submitted.pkl")
        assert task.arguments == (str(folder), "--out=weights.safetensors") and task.command == "export"
    assert "\tfit 2 waiting; test 2 waiting; export 2 waiting\t" in chains.jobs("list")


def test_a_chain_whose_last_link_slurm_does_not_take_leaves_nothing(
    chains: Chains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    refusal = "echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *--test-only*) ;; *) echo >>{tmp_path}/calls;; esac\n'
        f"[ -e {tmp_path}/calls ] && [ $(wc -l <{tmp_path}/calls) = 3 ] && {{ {refusal}; }}\n"
        f'exec {shutil.which("sbatch")} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    before = chains.queue()
    assert submit.main(["--no-snapshot", "--then", "test", "--then", "export"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "lockstep: --then 'export': Slurm rejects this job: Job violates accounting/QOS" in said.err
    assert said.err.endswith("is cancelled and removed.\n") and len((tmp_path / "calls").read_text()) == 3
    assert chains.queue() == before and not list(chains.project.iterdir()) and not registered_jobs(os.environ)


def test_digits_are_trained_tested_and_exported(shell: Shell) -> None:
    arguments = ("--trainer.max_epochs", "1", "--wandb.mode", "disabled", "--then", "test", "--then", "export --part network")
    done = shell("launch/slurm.py", *arguments)
    assert done.returncode == 0, done.stderr
    shell.jobs.extend(done.stdout.split())
    followed = shell("launch/jobs.py", "logs", "-f")
    assert followed.returncode == 0, followed.stdout
    fit, test, export = json.loads(shell("launch/jobs.py", "status", "--json").stdout)
    assert [part["state"] for part in (fit, test, export)] == ["finished"] * 3
    results = [RunResult.read(Run(Path(part["run"])).result) for part in (fit, test)]
    assert results[0] is not None and results[1] is not None and results[0].weights_sha256 == results[1].weights_sha256
    assert fit["metrics"]["test/accuracy"] == test["metrics"]["test/accuracy"]
    assert export["result"]["weights"] == f"{fit['run']}/weights.safetensors" and Path(export["result"]["weights"]).is_file()
    assert shell("launch/jobs.py", "logs").stdout.count("65,834 numbers") == 1
    code = [os.path.realpath(Path(part["run"]) / "code") for part in (fit, test, export)]
    assert len(set(code)) == 1
