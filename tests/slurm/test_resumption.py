"""The resources of a run that is resumed, without Slurm."""

from pathlib import Path

import pytest

from lockstep.cli import submit
from lockstep.core import UsageError
from lockstep.runs import LaunchRecord, Run
from lockstep.slurm.submission import NodeRange, Profile
from lockstep.slurm.submission.profile import Container

SUBMITTED = Profile(
    partition="debug",
    time="1-00:00:00",
    gpus_per_node=4,
    mem="0",
    exclusive=True,
    nodelist="n1,n2",
    sbatch=("--hold", "--comment=a b"),
    setup=("ulimit -n 4096",),
    environment={"NCCL_DEBUG": "WARN"},
    container=Container("image.sqsh", ("/data:/data",)),
    network=False,
)


def resources(run: Run, *flags: str) -> tuple[Profile, NodeRange]:
    return submit.resources(submit.make_parser("submit").parse_args(flags), run)


def test_a_resumed_run_has_the_resources_of_its_submission_where_no_flag_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = tmp_path / "configs" / "cluster" / "mine.yaml"
    cluster.parent.mkdir(parents=True)
    cluster.write_text("environment: {NCCL_DEBUG: INFO, OTHER: x}\n")
    monkeypatch.setenv("LOCKSTEP_PROFILE", "a100")  # that of another cluster
    run = Run.create(tmp_path, "x")
    record = LaunchRecord(
        "", "2-4", 4, folder=str(tmp_path), profile="mine", slurm=SUBMITTED.non_default_values(), paths=[str(tmp_path)]
    )
    record.write(run.launch)
    as_before = vars(SUBMITTED) | {"environment": {"NCCL_DEBUG": "INFO"}, "sbatch": ("--comment=a b",)}
    profile, nodes = resources(run)
    assert (vars(profile), nodes) == (as_before, NodeRange(2, 4))
    said = capsys.readouterr().err
    assert said == (
        "resources, from the flags and the submission of the run: --nodes 2-4 --partition debug --nodelist n1,n2 "
        "--time 1-00:00:00 --gpus-per-node 4 --mem 0 --exclusive --sbatch --comment=a b --setup ulimit -n 4096 "
        "--environment NCCL_DEBUG --container image.sqsh --network False\n"
    )
    profile, nodes = resources(
        run, "--nodes", "1", "--time", "60", "--exclude", "n3", "--sbatch=--nice", "--ranks-per-node", "2"
    )
    flagged = {"time": "60", "nodelist": None, "exclude": "n3", "sbatch": ("--comment=a b", "--nice"), "ranks_per_node": 2}
    assert (vars(profile), nodes) == (as_before | flagged, NodeRange(1, 1))
    assert resources(run, "--profile", str(cluster)) == (
        Profile(environment={"NCCL_DEBUG": "INFO", "OTHER": "x"}),
        NodeRange(2, 4),
    )
    cluster.unlink()
    with pytest.raises(
        UsageError,
        match=r"--resume: the run had the environment variable NCCL_DEBUG, which mine no longer sets; give the resources",
    ):
        resources(run)
    LaunchRecord("", 1, 1, slurm={"time": "never"}).write(run.launch)
    with pytest.raises(
        UsageError, match=r"--resume: .*launch.yaml: time: 'never' is not a time; .* Or give the resources with --profile"
    ):
        resources(run)
    for damaged in ({"sbatch": 5}, {"environment": 5}):
        LaunchRecord("", 1, 1, slurm=damaged).write(run.launch)
        with pytest.raises(UsageError, match=r"launch.yaml: \w+: 5 must be .* Or give the resources with --profile"):
            resources(run)
    LaunchRecord("", "many", 1, slurm={}).write(run.launch)
    with pytest.raises(UsageError, match=r"launch.yaml: nodes: 'many' is not a number of nodes; .*; set --nodes"):
        resources(run)
    run.launch.write_text("command: x\nnodes: 1\nranks_per_node: 1\nslurm: [1]\n")
    with pytest.raises(UsageError, match=r"launch.yaml is damaged: slurm: \[1\]; give the resources with --profile"):
        resources(run)
    LaunchRecord("", 1, 1).write(run.launch)  # of a local run, which submit refuses to resume
    assert resources(run, "--profile", "one-machine")[1] == NodeRange(1, 1)
