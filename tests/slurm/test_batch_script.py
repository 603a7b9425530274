"""Batch scripts of the example profiles against golden files, and errors in profiles; without Slurm.

After an intended change run with LOCKSTEP_WRITE_GOLDEN=1 and read the diff.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.configs import DIGITS
from support.runs import REPO

from lockstep.config.sweep import parse_sweep
from lockstep.core.errors import UsageError
from lockstep.runs.snapshot import CodePaths
from lockstep.slurm.dependencies import Dependency
from lockstep.slurm.submission.batch_script import JobRequest, batch_script
from lockstep.slurm.submission.options import LaunchOptions, NodeRange
from lockstep.slurm.submission.profile import Profile, apply_flags, load_profile, parse_minutes
from lockstep.slurm.submission.sbatch import scrub_environment
from lockstep.slurm.submission.submission import Submission

GOLDEN = Path(__file__).parent / "golden"
PROFILES = [path.stem for path in sorted((REPO / "configs" / "cluster").glob("*.yaml"))]


OPTIONS = LaunchOptions(Path("/home/user/project"), nodes=NodeRange(4, 4))


def request_for(profile: Profile, options: LaunchOptions = OPTIONS, runs: int = 1) -> JobRequest:
    folder = Path("/home/user/project/runs/digits/20260101-000000-abcd")
    code = CodePaths((folder / "code/project", folder / "code/project/src"), None, "0" * 64)
    return JobRequest("digits", folder, code, profile, options, runs)


def script(request: JobRequest) -> str:
    return batch_script(request).replace(sys.executable, "/home/user/.venv/bin/python")


@pytest.mark.parametrize("name", [*PROFILES, "apptainer", "sweep"])
def test_the_script_of_each_example_profile(name: str) -> None:
    profile = load_profile("a100" if name == "sweep" else name, {}, [REPO / "configs" / "cluster", GOLDEN])
    request = request_for(profile)
    if name == "sweep":
        request = request_for(profile, replace(OPTIONS, array_parallelism=2, after=Dependency.on("afterok", "1234")), runs=6)
    text, golden = script(request), GOLDEN / f"{name}.sh"
    if os.environ.get("LOCKSTEP_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_flags_override_the_profile_and_extend_its_lists() -> None:
    profile = load_profile("a100", {}, [REPO / "configs" / "cluster"])
    changed = apply_flags(profile, {"time": "2-00:00:00", "gpus_per_node": 4, "sbatch": ["--begin=now"], "partition": None})
    text = script(request_for(changed))
    assert (
        "--time=2880\n" in text and "--gpus-per-node=4\n" in text and "--partition=a100\n" in text and "--begin=now\n" in text
    )
    assert "#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --cpus-per-task=64\n" in text


def test_a_hostile_path_is_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "a 'b' \"c\" $(touch pwned) ü"
    code = CodePaths((folder,), None, "")
    request = JobRequest("x", folder, code, Profile(environment={"A": "$(touch pwned) 'b'"}), LaunchOptions(folder))
    env = {**os.environ, "SLURM_JOB_ID": "1", "LOCKSTEP_ENV_A": "$(touch pwned) 'b'"}
    (folder / "slurm").mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)
    assert "touch pwned) 'b'" not in batch_script(request)
    text = batch_script(request).replace("srun --unbuffered", 'printf "%s\\n" "$A" "$PYTHONPATH" #')
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"$(touch pwned) 'b'\n{folder}\n", done.stderr
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("sleep", ["echo $1 >>waits", "return 137"], ids=["waits", "is killed"])
def test_a_job_whose_attempts_cannot_be_claimed_gives_up(tmp_path: Path, sleep: str) -> None:
    """As on a full disk: the supervisor fails each time."""
    for name, text in (("squeue", "exit 0"), ("python", "cat >/dev/null; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "slurm").mkdir(mode=0o700)
    tmp_path.chmod(0o700)
    request = JobRequest(
        "x", tmp_path, CodePaths((tmp_path,), None, ""), Profile(python=f"{tmp_path}/python"), LaunchOptions(tmp_path)
    )
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    text = f"sleep() {{ {sleep}; }}\n" + batch_script(request)
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("No attempt could be started; tried 60 of 60 times.\n"), done.stderr
    assert (tmp_path / "slurm/7.exit").read_text() == "1\n"
    if "waits" in sleep:
        waits = [int(line) for line in (tmp_path / "waits").read_text().splitlines()]
        assert waits[0] == 1 and max(waits) == 10 and sum(waits) > 9 * 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitions: x", "partitions: unknown key; did you mean 'partition'?"),
        ("gpus_per_node: many", "gpus_per_node: 'many' must be a whole number."),
        ("exclusive: perhaps", "exclusive: 'perhaps' must be true or false."),
        ("time: 1 day", "'1 day' is not a time"),
        ("container: {image: x, runtime: docker}", "container.runtime: 'docker' is not valid; valid are apptainer, pyxis."),
        ("container: {mounts: [a]}", "container.image: must be set."),
        ("setup: [export WANDB_API_KEY=x]", "setup.WANDB_API_KEY: a secret must not be in a profile"),
        ("srun: '--export=ALL,MY_PASSWD=abc'", "srun.MY_PASSWD: a secret must not be in a profile"),
        ("setup: ['A=1;MY_PASSWD=abc']", "setup.MY_PASSWD: a secret"),
        ("""setup: ["export OPTS='a=b,MY_PASSWD=abc'"]""", "setup.MY_PASSWD: a secret"),
        ("""setup: ['export MY_PASSWD="abc"']""", "setup.MY_PASSWD: a secret"),
        ("setup: [mysql --password abc]", "setup.password: a secret"),
        (f"setup: [wandb login {'0a' * 20}]", "setup: a secret"),
        ('account: "x\\ntouch y"', "account: 'x\\ntouch y' must be a text of one line"),
        ("sbatch: --clusters=other", "selects another cluster"),
        ("sbatch: --gpus-per-task=1", "one task per node, whose ranks share the GPUs of the node; use gpus_per_node."),
        ("srun: --het-group=0,1", "srun: '--het-group=0,1': heterogeneous jobs are not supported: all nodes of a run have"),
        ("sbatch: ['#SBATCH hetjob']", "sbatch: '#SBATCH hetjob': heterogeneous jobs are not supported"),
        ("setup: ['#SBATCH --mem=4G']", "setup: '#SBATCH --mem=4G' is a comment to the shell; write --name=value into sbatch"),
        ("srun: --gpu-bind=closest", "srun: '--gpu-bind=closest' is for tasks"),
        ("srun: --ntasks-per-node=8", "the launcher sets ntasks-per-node itself; use --ranks-per-node."),
        ("environment: {WANDB_API_KEY: x}", "environment.WANDB_API_KEY: a secret must not be in a profile"),
        ("environment: [A]", "must be variables with values"),
        ("sbatch: [gres=x]", "sbatch: 'gres=x' must be one line of the form --name or --name=value."),
        ("scratch: /x/`id`", "scratch: '/x/`id`' must be a path"),
        ("- a", "expected a mapping, got ['a']."),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_profile_raises_error_with_key_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load_profile(str(path), {}, [])
    assert message in error.value.message


def test_a_profile_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UsageError, match=r"^profile: /proc/self/mem cannot be read \(Input/output error\)\.$"):
        load_profile("/proc/self/mem", {}, [])


def test_a_drawn_seed_is_the_same_at_each_start_of_a_run(tmp_path: Path) -> None:
    arguments = [*DIGITS, "--seed_everything=true", f"--run.root={tmp_path}"]
    options = LaunchOptions(tmp_path, sweep={"model.lr": ["0.1", "0.2"]})
    made = [Submission.create(arguments, Profile(), options, {}) for _ in range(2)]
    seeds = [[made[i].run_arguments(run)[-2] for run in (0, 1, 0)] for i in (0, 1)]
    assert all(re.fullmatch(r"--seed_everything=\d+", seed) for row in seeds for seed in row)
    assert seeds[0][0] == seeds[0][2] != seeds[0][1] and seeds[0] != seeds[1]


def test_the_first_profile_of_a_name_wins(tmp_path: Path) -> None:
    for folder, partition in (("one", "first"), ("two", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(f"partition: {partition}\ntime: 24:00:00\n")
    folders = [tmp_path / "one", tmp_path / "two"]
    assert load_profile(None, {"LOCKSTEP_PROFILE": "mine"}, folders) == Profile(partition="first", time="24:00:00")
    assert load_profile(None, {}, folders) == Profile()
    with pytest.raises(UsageError, match=r"'mien' is not in .* did you mean 'mine'"):
        load_profile("mien", {}, folders)


@pytest.mark.parametrize(("text", "expected"), [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("1-2", 1560), ("1-0:30", 1470)])
def test_times_are_minutes_rounded_up(text: str, expected: int) -> None:
    assert parse_minutes(text) == expected


def test_variables_of_an_enclosing_job_are_scrubbed() -> None:
    inherited = ("SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_ACCOUNT", "RANK", "MASTER_PORT", "GOMP_CPU_AFFINITY", "PMIX_RANK")
    env = dict.fromkeys([*inherited, "SLURM_CONF", "LOCKSTEP_PROFILE", "HOME", "WANDB_API_KEY", "OMP_NUM_THREADS"], "x")
    assert sorted(scrub_environment(env)) == sorted(inherited)
    assert set(env) == {"SLURM_CONF", "LOCKSTEP_PROFILE", "HOME", "WANDB_API_KEY", "OMP_NUM_THREADS"}


def test_commas_in_brackets_do_not_separate_the_values_of_a_sweep() -> None:
    assert parse_sweep(["model.lr=0.1,0.03", "a.b=[1,2],[3]"]) == {"model.lr": ["0.1", "0.03"], "a.b": ["[1,2]", "[3]"]}
    assert parse_sweep(["a=[[1,2],[3,4]],[[5]]"]) == {"a": ["[[1,2],[3,4]]", "[[5]]"]}
    assert parse_sweep(["a={b: {c: 1, d: 2}, e: [3,4]},'x,,]',y"]) == {"a": ["{b: {c: 1, d: 2}, e: [3,4]}", "'x,,]'", "y"]}
    for wrong in (["model.lr"], ["=1"], ["a=1", "a=2"], ["a=1,1"], ["a="], ["a=1,,2"], ["a=,1"], ["a=1,"], ["a=[1,2"]):
        with pytest.raises(UsageError, match="--sweep"):
            parse_sweep(wrong)
