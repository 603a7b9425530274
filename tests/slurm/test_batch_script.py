"""The whole sbatch script, srun line included, for each example profile. No Slurm and no torch: text against golden files.

A change on purpose: run with LOCKSTEP_WRITE_GOLDEN=1 and read the difference.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from support.runs import REPO

from lockstep.config.sweep import parse_sweep
from lockstep.core.errors import UsageError
from lockstep.runs.snapshot import CodePaths
from lockstep.slurm.submission.batch_script import JobRequest, batch_script
from lockstep.slurm.submission.profile import Profile, apply_flags, load_profile, parse_minutes
from lockstep.slurm.submission.resources import NodeRange
from lockstep.slurm.submission.sbatch import scrub_environment

GOLDEN = Path(__file__).parent / "golden"
PROFILES = [path.stem for path in sorted((REPO / "configs" / "cluster").glob("*.yaml"))]


def request_for(profile: Profile, **more: Any) -> JobRequest:
    folder = Path("/home/user/project/runs/digits/20260101-000000-abcd")
    code = CodePaths((folder / "code/project", folder / "code/project/src"), None, "0" * 64)
    return JobRequest("digits", folder, Path("/home/user/project"), code, NodeRange(4, 4), profile, **more)


def script(request: JobRequest) -> str:
    return batch_script(request).replace(sys.executable, "/home/user/.venv/bin/python")


@pytest.mark.parametrize("name", [*PROFILES, "apptainer", "sweep"])
def test_the_script_of_each_example_profile(name: str) -> None:
    more: dict[str, Any] = {}
    if name == "sweep":
        profile, more = (
            load_profile("a100", {}, [REPO / "configs" / "cluster"]),
            {"runs": 6, "array_parallelism": 2, "after": "1234"},
        )
    elif name == "apptainer":
        profile = load_profile(str(GOLDEN / "apptainer.yaml"), {}, [])
    else:
        profile = load_profile(name, {}, [REPO / "configs" / "cluster"])
    made, golden = script(request_for(profile, **more)), GOLDEN / f"{name}.sh"
    if os.environ.get("LOCKSTEP_WRITE_GOLDEN"):
        golden.write_text(made)
    assert made == golden.read_text()


def test_flags_win_over_the_profile_and_lists_are_added_to() -> None:
    profile = load_profile("a100", {}, [REPO / "configs" / "cluster"])
    changed = apply_flags(profile, {"time": "2-00:00:00", "gpus_per_node": 4, "sbatch": ["--begin=now"], "partition": None})
    text = script(request_for(changed))
    assert (
        "--time=2880\n" in text and "--gpus-per-node=4\n" in text and "--partition=a100\n" in text and "--begin=now\n" in text
    )
    assert "#SBATCH --ntasks-per-node=4\n" in text and "#SBATCH --cpus-per-task=16\n" in text


def test_a_hostile_path_stays_one_word(tmp_path: Path) -> None:
    folder = tmp_path / "a 'b' \"c\" $(touch pwned) ü"
    code = CodePaths((folder,), None, "")
    request = JobRequest("x", folder, folder, code, NodeRange(1, 1), Profile(environment={"A": "$(touch pwned) 'b'"}))
    env = {**os.environ, "SLURM_JOB_ID": "1"}
    (folder / "slurm").mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)
    text = batch_script(request).replace("srun --unbuffered", 'printf "%s\\n" "$A" "$PYTHONPATH" #')
    import subprocess

    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"$(touch pwned) 'b'\n{folder}\n", done.stderr
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitions: x", "partitions: a profile has no such key; did you mean 'partition'?"),
        ("gpus_per_node: many", "gpus_per_node: 'many' must be a whole number."),
        ("exclusive: perhaps", "exclusive: 'perhaps' must be true or false."),
        ("time: 1 day", "'1 day' is no time"),
        ("container: {image: x, runtime: docker}", "runtime: 'docker' is not valid; valid are apptainer, pyxis."),
        ("container: {mounts: [a]}", "image: must be set."),
        ("setup: [export WANDB_API_KEY=x]", "setup.WANDB_API_KEY: a secret does not belong into a profile"),
        ('account: "x\\ntouch y"', "account: 'x\\ntouch y' must be a text of one line"),
        ("sbatch: --clusters=other", "leads to another cluster"),
        ("environment: {WANDB_API_KEY: x}", "environment.WANDB_API_KEY: a secret does not belong into a profile"),
        ("environment: [A]", "must be variables with values"),
        ("sbatch: [gres=x]", "sbatch: 'gres=x' must be one line of the form --name or --name=value."),
        ("scratch: /x/`id`", "scratch: '/x/`id`' must be a path"),
        ("- a", "must hold keys with values."),
        ("a: [", "is no valid YAML"),
    ],
)
def test_a_wrong_profile_raises_error_with_key_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load_profile(str(path), {}, [])
    assert message in error.value.message


def test_profiles_are_found_by_name_first_hit_first(tmp_path: Path) -> None:
    for folder, partition in (("one", "first"), ("two", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(f"partition: {partition}\ntime: 24:00:00\n")
    folders = [tmp_path / "one", tmp_path / "two"]
    assert load_profile(None, {"LOCKSTEP_PROFILE": "mine"}, folders) == Profile(partition="first", time="24:00:00")
    assert load_profile(None, {}, folders) == Profile()
    with pytest.raises(UsageError, match=r"there is no 'mien' in .* did you mean 'mine'"):
        load_profile("mien", {}, folders)


@pytest.mark.parametrize(("text", "expected"), [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("1-2", 1560), ("1-0:30", 1470)])
def test_times_are_minutes_rounded_up(text: str, expected: int) -> None:
    assert parse_minutes(text) == expected


def test_what_an_enclosing_job_has_left_is_scrubbed() -> None:
    inherited = ("SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_ACCOUNT", "RANK", "MASTER_PORT", "GOMP_CPU_AFFINITY", "PMIX_RANK")
    env = dict.fromkeys([*inherited, "SLURM_CONF", "LOCKSTEP_PROFILE", "HOME", "WANDB_API_KEY", "OMP_NUM_THREADS"], "x")
    assert sorted(scrub_environment(env)) == sorted(inherited)
    assert set(env) == {"SLURM_CONF", "LOCKSTEP_PROFILE", "HOME", "WANDB_API_KEY", "OMP_NUM_THREADS"}


def test_sweeps_are_read_with_commas_in_brackets() -> None:
    assert parse_sweep(["model.lr=0.1,0.03", "a.b=[1,2],[3]"]) == {"model.lr": ["0.1", "0.03"], "a.b": ["[1,2]", "[3]"]}
    for wrong in (["model.lr"], ["=1"], ["a=1", "a=2"], ["a=1,1"], ["a="]):
        with pytest.raises(UsageError, match="--sweep"):
            parse_sweep(wrong)
