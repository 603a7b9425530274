"""Submissions on the one-machine cluster. Cheapest first: rejected ones, held jobs, then jobs that train."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.slurm_jobs import REPO, Job, Shell
from support.waiting import wait_until
from support.wandb_reader import read_history, read_records

from lockstep.slurm.cluster import Cluster

pytestmark = pytest.mark.timeout(150)
HELD = ("--sbatch=--hold", "--config", "toy_model.yaml")
HOSTILE = "a 'b' \"c\" $(touch pwned) `touch pwned` \\ ;|& ü\nsecond line"


def files_of(folder: Path) -> list[Path]:
    """All files and folders, but for what Python compiles where it imports a module."""
    return [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--node 4", "node (value 4): unknown key; did you mean 'nodes'"),
        ("--trainer.max_epoch 4", "trainer.max_epoch (value 4): unknown key; did you mean 'trainer.max_epochs'"),
        ("--trainer.max_epochs ten", "trainer.max_epochs: 'ten' is not valid"),
        ("--model toy_model.ToyModle", "toy_model.ToyModle does not exist; did you mean 'toy_model.ToyModel'"),
        ("--model.wrod none", "model.wrod (value none): unknown argument of toy_model.ToyModel; did you"),
        ("--config gone.yaml", "config: gone.yaml does not exist"),
        (
            "--sweep model.wrod=1,2",
            "model.wrod (value 1): unknown argument of toy_model.ToyModel; did you mean 'model.word'",
        ),
        ("--sweep model.word", "--sweep: 'model.word' must have the form KEY=A,B"),
        ("--run.root /proc/runs", "run.root: the run folder /proc/runs/toy/"),
        ("--profile a10", "profile: 'a10' is not in "),
        ("--after never", "--after: 'never' is neither a job id nor a run that lockstep has submitted here"),
        ("--after 999999", "--after: Slurm does not know job 999999"),
        ("--nodes four", "argument --nodes: 'four' is not a number of nodes; write 4, or 2-4; --help lists the flags."),
        ("--nodes 4-2", "argument --nodes: 4-2 must be 1 or more, the smaller number first"),
        ("--sbatch --hold", "argument --sbatch: expected one argument; write it with =, such as --sbatch=--hold"),
        ("--sbatch=--array=1-3", "sbatch: '--array=1-3': the launcher sets array itself; use --sweep."),
        ("--sweep nodes=1,2", "--sweep: nodes cannot be swept over"),
        ("--sweep model.word=1,,2", "--sweep: 'model.word=1,,2' has an empty value"),
        ("--time 0", "time: '0' must be more than 0"),
        ("--ckpt_path /nope", "ckpt_path: /nope does not exist"),
        ("--trainer.accelerator gpu", "trainer.accelerator: 'gpu' needs GPUs; request some with --gpus-per-node."),
        (
            "--gpus-per-node 2 --ranks-per-node 4",
            "ranks_per_node: 4 ranks need a GPU each, and gpus_per_node is 2; request as many GPUs as ranks, or use",
        ),
        ("--nodes 0", "argument --nodes: 0 must be 1 or more"),
        ("--time soon", "time: 'soon' is not a time"),
        ("--partition nowhere", "Invalid partition name specified. Requested: 1 node of 1 rank; partitions are debug, short"),
        ("--nodes 9", "Requested: 9 nodes of 1 rank; partition debug has 4 nodes"),
        ("--gpus-per-node 8", "8 GPUs per node; partition debug has 4 nodes, each 4 CPUs, 64000 MB, no GPUs"),
        (
            "--partition short --time 10",
            "10 of time; partition short has 4 nodes, each 4 CPUs, 64000 MB, no GPUs, and a time limit of 1:00",
        ),
        ("--cpus-per-rank 64", "64 CPUs per rank; partition debug has 4 nodes, each 4 CPUs"),
    ],
)
def test_mistakes_are_rejected_before_anything_is_queued_or_written(shell: Shell, arguments: str, message: str) -> None:
    before = files_of(shell.project)
    done = shell("launch/slurm.py", "--config", "toy_model.yaml", *arguments.split())
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not shell.queue() and files_of(shell.project) == before


def test_a_missing_slurm_conf_is_reported_at_once(shell: Shell) -> None:
    for script, *arguments in (("launch/slurm.py",), ("launch/jobs.py", "list")):
        done = shell(script, *arguments, SLURM_CONF="/gone/slurm.conf")
        assert done.returncode == 2 and "that cluster is gone; unset SLURM_CONF" in done.stderr


def test_a_full_home_does_not_prevent_a_submission(shell: Shell) -> None:
    done = shell("launch/slurm.py", *HELD, XDG_STATE_HOME="/dev/null")
    assert done.returncode == 0 and "jobs.py will not list it" in done.stderr
    shell.jobs.append(done.stdout.strip())
    index = Path(shell.env["XDG_STATE_HOME"]) / "lockstep/jobs.jsonl"
    index.parent.mkdir(parents=True)
    index.write_text('{"job": "1", "fol')  # truncated by a full disk
    job = shell.submit(*HELD)
    assert job.status()["state"] == "waiting" and len(shell("launch/jobs.py", "list").stdout.splitlines()) == 1


def test_a_cancelled_run_of_a_sweep_stays_cancelled(shell: Shell) -> None:
    job = shell.submit(*HELD, "--sweep", "model.word=a,b,c")
    assert shell("launch/jobs.py", "cancel", f"{job.id}_1").returncode == 0
    time.sleep(3)  # until Slurm has forgotten the task
    states = [run["state"] for run in json.loads(shell("launch/jobs.py", "status", job.id, "--json").stdout)]
    assert states == ["waiting", "cancelled", "waiting"]


def test_a_world_writable_run_root_is_rejected(shell: Shell) -> None:
    shared = shell.project / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    done = shell("launch/slurm.py", *HELD, "--run.root", "shared")
    assert done.returncode == 2 and f"others can write to {shared}" in done.stderr
    assert not list(shared.iterdir()) and not shell.queue()


def test_the_launcher_never_imports_torch(shell: Shell) -> None:
    code = (
        "import sys; from lockstep.cli import submit; "
        f"assert submit.main({[*HELD, '--nodes', '2']!r}) == 0; "
        "sys.exit(' '.join({'torch', 'lightning', 'jsonargparse', 'toy_model'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=shell.project, env=shell.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shell.jobs.append(done.stdout.strip())


def test_a_job_may_wait_for_drained_nodes(shell: Shell) -> None:
    shell.cluster.command("scontrol", "update", "NodeName=n4", "State=DRAIN", "Reason=maintenance")
    try:
        job = shell.submit("--nodes", "4", "--config", "toy_model.yaml")
        status = job.wait("waiting")
        done = shell("launch/slurm.py", "--nodes", "5", "--config", "toy_model.yaml")
        assert done.returncode == 2 and "Requested: 5 nodes of 1 rank; partition debug has 4 nodes" in done.stderr
        shell("launch/jobs.py", "cancel", job.id)
    finally:
        shell.cluster.command("scontrol", "update", "NodeName=n4", "State=RESUME")
    assert "node" in status["message"].lower(), status


def test_print_config_queues_nothing(shell: Shell) -> None:
    done = shell("launch/slurm.py", "--config", "toy_model.yaml", "--print_config")
    assert done.returncode == 0 and "class_path: toy_model.ToyModel" in done.stdout
    assert not shell.queue() and not (shell.project / "runs").exists()


def test_a_module_that_git_ignores_is_rejected(shell: Shell) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=shell.project, check=True)
    (shell.project / ".gitignore").write_text("toy_model.py\n")
    done = shell("launch/slurm.py", "--config", "toy_model.yaml")
    assert done.returncode == 2 and "toy_model.py is needed, but git ignores it" in done.stderr
    assert not shell.queue() and not (shell.project / "runs").exists()


def test_a_run_folder_is_private_and_contains_no_secret(shell: Shell) -> None:
    key = "0123456789abcdef" * 2 + "beefbeef"
    job = shell.submit(*HELD, WANDB_API_KEY=key)
    assert stat.S_IMODE(job.folder.stat().st_mode) == 0o700
    files = [path for path in job.folder.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if key.encode() in path.read_bytes()]
    (shell.project / "notes.txt").write_text(f"my key is {key}")
    done = shell("launch/slurm.py", *HELD, WANDB_API_KEY=key)
    assert done.returncode == 2 and "notes.txt contains the W&B key" in done.stderr and key not in done.stderr
    netrc = shell.project.parent / "netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {key}\n")
    done = shell("launch/slurm.py", *HELD, NETRC=str(netrc))
    assert done.returncode == 2 and "notes.txt contains the W&B key" in done.stderr and key not in done.stderr
    assert [path for path in job.folder.parent.iterdir()] == [job.folder]
    done = shell("launch/slurm.py", *HELD, "--wandb.notes", key, WANDB_API_KEY=key)
    assert done.returncode == 2 and "The W&B key is in an argument" in done.stderr


def test_values_of_a_profiles_environment_reach_the_ranks_and_no_file(shell: Shell) -> None:
    value = "a 'value' of $HOME"
    (shell.project / "mine.py").write_text(
        "import os\nfrom toy_model import ToyModel\nclass Mine(ToyModel):\n    def on_fit_start(self):\n"
        "        print('the value has', len(os.environ['MY_VALUE']), 'characters', os.environ['MASTER_PORT'], flush=True)\n"
    )
    profile = shell.project.parent / "mine.yaml"  # outside the snapshot
    profile.write_text(json.dumps({"environment": {"MY_VALUE": value}}))
    arguments = ("--config", "toy_model.yaml", "--model", "mine.Mine", "--nodes", "2", "--profile", str(profile))
    job = shell.submit(*arguments, "--wandb.mode", "offline")
    job.wait("finished")
    log = (job.folder / "logs/1/node-0/0.log").read_text()
    found = re.search(rf"the value has {len(value)} characters (\d+)", log)
    assert found is not None and int(found[1]) != 15000 + int(job.id), log
    assert "listening on all interfaces" not in log
    files = [path for path in job.folder.rglob("*") if path.is_file() and value.encode() in path.read_bytes()]
    assert not files and "MY_VALUE" in (job.folder / "launch.yaml").read_text()


def test_a_job_is_unknown_while_slurm_does_not_answer(shell: Shell, tmp_path: Path) -> None:
    with Cluster.up(tmp_path / "c", nodes=1) as other:
        job = replace(shell, env=shell.env | other.env).submit(*HELD)
        assert job.status()["state"] == "waiting"
        other.command("scontrol", "shutdown")
        status = job.status()
    assert (status["state"], status["exit"]) == ("unknown", 3) and "Slurm does not answer" in status["message"]


def test_a_submission_is_retried_while_the_controller_restarts(shell: Shell, tmp_path: Path) -> None:
    """On a separate cluster: a killed controller forgets what it has not saved yet, such as the end of a job."""
    with Cluster.up(tmp_path / "c", nodes=1, options=["MessageTimeout=2"]) as other:
        other.lose("slurmctld")
        restore = threading.Timer(5, other.restore, ["slurmctld"])
        restore.start()
        done = replace(shell, env=shell.env | other.env)("launch/slurm.py", *HELD)
        restore.join()
        assert (done.returncode, "Slurm does not answer; retrying" in done.stderr) == (0, True), done.stderr
        assert other.command("squeue", "--noheader", "--format=%i").split() == [done.stdout.strip()]


def test_a_job_whose_submission_was_not_confirmed_is_not_queued_twice(shell: Shell, tmp_path: Path) -> None:
    real, wrapper = shutil.which("sbatch", path=shell.env["PATH"]), tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    lie = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *--test-only*) exec {real} "$@";; esac\n'
        f'[ -e {tmp_path}/once ] && exec {real} "$@"\ntouch {tmp_path}/once\n{real} "$@" >/dev/null; {lie}\n'
    )
    wrapper.chmod(0o755)
    before = set(shell.queue())
    job = shell.submit(*HELD, PATH=f"{wrapper.parent}:{shell.env['PATH']}")
    assert (tmp_path / "once").exists()
    assert set(shell.queue()) - before == {job.id}
    assert sorted(path.name for path in (job.folder / "slurm").glob("[!.]*")) == [
        f"{job.id}_submission.sh",
        f"{job.id}_submitted.pkl",
    ]


def test_a_job_that_is_never_confirmed_is_cancelled(shell: Shell, tmp_path: Path) -> None:
    real, wrapper = shutil.which("sbatch", path=shell.env["PATH"]), tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\n{real} "$@" >/dev/null; case "$*" in *--test-only*) exit 0;; esac; touch {tmp_path}/queued\n'
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1\n"
    )
    wrapper.chmod(0o755)
    script = tmp_path / "impatient.py"
    script.write_text(
        "from lockstep.cli import run_script\nfrom lockstep.slurm.submission import sbatch\n"
        "sbatch._RETRY_SECONDS = 0.0\nrun_script('submit', 'python launch/slurm.py')\n"
    )
    before = set(shell.queue())
    done = shell(str(script), *HELD, PATH=f"{wrapper.parent}:{shell.env['PATH']}")
    assert done.returncode == 2 and "timed out" in done.stderr and "queued nevertheless" not in done.stderr, done.stderr
    assert (tmp_path / "queued").exists() and set(shell.queue()) == before


def test_pickles_are_not_loaded_from_a_folder_that_others_can_write(shell: Shell) -> None:
    job = shell.submit(*HELD)
    job.folder.chmod(0o777)
    shell.cluster.command("scontrol", "release", job.id)
    status = job.wait(seconds=15)
    assert status["exit"] == 2 and "others can write to" in status["message"]


def test_a_changed_snapshot_is_rejected(shell: Shell) -> None:
    job = shell.submit(*HELD)
    subprocess.run(["sha256sum", "--check", "--quiet", "../code.sha256"], cwd=job.folder / "code", check=True)
    (job.folder / "code" / "project" / "toy_model.py").write_text("raise SystemExit")
    shell.cluster.command("scontrol", "release", job.id)
    status = job.wait(seconds=20)
    assert status["exit"] == 1 and "toy_model.py is changed: this is not the code that was submitted" in status["message"]


def test_a_sweep_of_a_thousand_is_one_job_in_seconds(shell: Shell) -> None:
    values = ",".join(map(str, range(500)))
    start = time.monotonic()
    job = shell.submit(*HELD, "--sweep", f"seed_everything={values}", "--sweep", "model.word=a,b")
    assert time.monotonic() - start < 20
    assert len(list(job.folder.parent.iterdir())) == 1001
    listed = shell("launch/jobs.py", "list").stdout.splitlines()
    assert len(listed) == 1 and "1000 waiting" in listed[0]
    assert shell("launch/jobs.py", "cancel", job.id).returncode == 0


def test_the_benchmark_of_submissions_runs(shell: Shell) -> None:
    before = shell.queue()
    done = shell("benchmarks/launch.py", "--rounds", "1", "--sweep-runs", "2", "--files", "30")
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0].strip() for line in done.stdout.splitlines()[1:]] == [
        "sbatch", "ten lines of submitit", "launch/slurm.py", "launch/slurm.py --no-snapshot",
        "launch/slurm.py in a folder of 30 files", "the same once more, when no file has changed", "a sweep of 2",
    ]  # fmt: skip
    assert shell.queue() == before


def test_dry_run_prints_everything_and_writes_nothing(shell: Shell) -> None:
    before = files_of(shell.project)
    done = shell("launch/slurm.py", "--nodes", "2", "--dry-run", "--config", "toy_model.yaml", "--model.word", "dry")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2" in done.stdout and "srun --unbuffered" in done.stdout and "word: dry" in done.stdout
    done = shell("launch/slurm.py", "--check", "--config", "toy_model.yaml", "--trainer.precision", "half")
    assert done.returncode == 2 and done.stdout == ""
    assert not shell.queue() and files_of(shell.project) == before


def test_ranks_are_placed_and_changes_after_submission_do_not_matter(shell: Shell) -> None:
    """Two concurrent jobs on the same nodes, submitted from inside a job, with hostile names; then the code changes."""
    inside = {
        "SLURM_JOB_ID": "999",
        "SLURM_NTASKS": "7",
        "SLURM_CPU_BIND": "mask_cpu:0x1",
        "SBATCH_PARTITION": "nowhere",
        "RANK": "3",
    }
    jobs: list[Job] = []
    for word in (HOSTILE, "plain"):
        job = shell.submit(
            *HELD, "--nodes", "2", "--ranks-per-node", "2", "--cpus-per-rank", "1", "--nodelist", "n1,n2",
            "--job-name", word, "--model.word", word, "--data.diary", f"diary {len(jobs)}", **inside,
        )  # fmt: skip
        name = shell.cluster.command("squeue", f"--jobs={job.id}", "--noheader", "--format=%j")
        assert name.rstrip("\n") == word
        jobs.append(job)
    code = shell.project / "toy_model.py"
    code.write_text(code.read_text().replace("as submitted", "as edited"))
    (shell.project / "toy_model.yaml").unlink()
    for job in jobs:
        shell.cluster.command("scontrol", "release", job.id)
    both = {job.id for job in jobs}
    running = ("squeue", "--noheader", "--states=RUNNING", "--format=%i")
    wait_until(lambda: both <= set(shell.cluster.command(*running).split()), seconds=20, describe=shell.queue)
    for number, (job, word) in enumerate(zip(jobs, (HOSTILE, "plain"), strict=True)):
        assert job.wait()["exit"] == 0
        for rank in range(4):
            place = f"as submitted: rank {rank} node {rank // 2} local {rank % 2} on n{rank // 2 + 1} says {word!r}"
            assert place in job.log(rank), job.log(rank)
        noted = sorted(path.name.split("-")[0] for path in (shell.project / f"diary {number}").iterdir())
        assert noted == ["prepare", "setup", "setup", "setup", "setup"]
        assert re.search(r"4 ranks on 2 nodes, rendezvous tcp://127", job.log())
        assert job.result["world_size"] == 4 and job.result["weights_sha256"] == jobs[0].result["weights_sha256"]
    assert not list(shell.project.rglob("pwned"))


@pytest.mark.timeout(300)
def test_slurm_local_and_srun_give_the_same_weights(shell: Shell) -> None:
    digits = ("--nodes", "2", "--trainer.max_epochs", "5", "--run.root", "runs")
    job = shell.submit(*digits, WANDB_MODE="offline")
    status = job.wait(seconds=120)
    assert status["exit"] == 0 and status["metrics"]["test/accuracy"] >= 0.95
    assert len(status["attempts"]) == 1, job.log()
    assert len(list((job.folder / "wandb").glob("offline-run-*"))) == 1, job.log()
    done = shell("launch/local.py", *digits)
    assert done.returncode == 0, done.stderr
    config = ("--config", str(REPO / "configs/digits.yaml"), *digits[2:])
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--quiet", sys.executable, "-m", "lockstep.cli", "train", *config]
    subprocess.run(command, cwd=shell.project, env=shell.env, check=True, capture_output=True, timeout=150)
    results = [json.loads(path.read_text()) for path in job.folder.parent.glob("*/result.json")]
    assert [result["world_size"] for result in results] == [2] * 3
    assert {result["weights_sha256"] for result in results} == {job.result["weights_sha256"]}


def test_zero_3_trains_as_a_job_of_four_nodes(shell: Shell) -> None:
    presets = ("--config", str(REPO / "configs/digits.yaml"), "--config", str(REPO / "configs/deepspeed_zero3.yaml"))
    job = shell.submit(
        "--nodes", "4", *presets, "--profile", "one-machine", "--wandb.mode", "offline", "--trainer.max_epochs", "10"
    )
    assert job.wait(seconds=140)["exit"] == 0, job.log()
    assert job.result["metrics"]["test/accuracy"] >= 0.97 and job.result["world_size"] == 4
    assert len(list(job.folder.glob("checkpoints/step-*/shard-*.pt"))) >= 4
    assert len(list(job.folder.glob("wandb/*run-*"))) == 1


def test_a_sweep_is_one_job_one_group_and_one_table(shell: Shell) -> None:
    sweep = ("--sweep", "model.seconds=0,0.001,0.002", "--sweep", "seed_everything=1,2")
    job = shell.submit("--config", "toy_model.yaml", *sweep, WANDB_MODE="offline")
    assert len(shell.cluster.command("squeue", "--array", "--noheader", "--format=%F").split()) == 6
    job.wait_for_state(seconds=120)
    done = shell("launch/jobs.py", "status", job.id)
    assert done.returncode == 0
    rows = [line.split("\t") for line in done.stdout.splitlines()[:6]]
    assert [row[:4] for row in rows] == [
        [f"{job.id}_{index}", seconds, seed, "finished"]
        for index, (seconds, seed) in enumerate((s, d) for s in ("0", "0.001", "0.002") for d in ("1", "2"))
    ]
    runs = json.loads(shell("launch/jobs.py", "status", job.id, "--json").stdout)
    assert all(run["metrics"]["val/loss"] < 100 for run in runs)
    groups = set()
    for run in runs:
        starts = [record["run"] for record in read_records(Path(run["run"])) if record["type"] == "run"]
        # On a busy machine W&B may be started again at the end, to send rows that its file did not have; each is there once.
        steps = [row["_step"] for row in read_history(Path(run["run"]))]
        assert len(set(steps)) == len(steps) == len((Path(run["run"]) / "metrics.csv").read_text().splitlines()) - 1
        assert starts and {start["run_id"] for start in starts} == {Path(run["run"]).name}
        groups |= {start["run_group"] for start in starts}
    assert groups == {job.folder.name}, os.listdir(job.folder)
