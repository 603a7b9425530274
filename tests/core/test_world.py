"""World.from_env: the variables of every launcher, and every contradiction; no process is started."""

import pytest

from lockstep.core.errors import UsageError
from lockstep.core.world import World

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SUBMITIT_LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NODEID": "0",
    "LOCKSTEP_RENDEZVOUS": "file:///tmp/r",
}


def test_an_empty_environment_is_a_single_process() -> None:
    assert World.from_env({}) == World(0, 1, 0, 1, "", "process")


def test_torchrun() -> None:
    world = World.from_env(TORCHRUN)
    assert world == World(3, 4, 1, 2, "env://", "torchrun")
    assert (world.nodes, world.node_rank, world.is_rank_zero) == (2, 1, False)


def test_srun() -> None:
    assert World.from_env(SRUN) == World(3, 4, 1, 2, "tcp://10.0.0.7:16234", "slurm")


def test_srun_with_address_and_port_from_the_launcher() -> None:
    world = World.from_env(SRUN | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4711", "SUBMITIT_EXECUTOR": "slurm"})
    assert world == World(3, 4, 1, 2, "tcp://10.0.0.9:4711", "submitit")


def test_submitit_local_executor() -> None:
    assert World.from_env(SUBMITIT_LOCAL) == World(1, 2, 1, 2, "file:///tmp/r", "submitit")


@pytest.mark.parametrize(
    "batch_script", [{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {"SLURM_JOB_ID": "7"}]
)
def test_a_shell_in_an_allocation_is_a_single_process(batch_script: dict[str, str]) -> None:
    assert World.from_env(batch_script) == World()


def test_torchrun_inside_srun_is_torchrun() -> None:
    assert World.from_env(SRUN | TORCHRUN | {"RANK": "2", "LOCAL_RANK": "0"}).launcher == "torchrun"


@pytest.mark.parametrize("rendezvous", ["file:///tmp/x", "tcp://10.0.0.7:29500", ""])
def test_environ_is_read_back(rendezvous: str) -> None:
    world = World(3, 4, 1, 2, rendezvous, "local") if rendezvous else World(launcher="local")
    assert World.from_env(world.environ()) == world


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (TORCHRUN | {"WORLD_SIZE": "5"}, ["5 ranks do not divide into nodes of 2", "WORLD_SIZE=5", "LOCAL_WORLD_SIZE=2"]),
        (TORCHRUN | {"RANK": "4"}, ["Rank 4 is outside 0…3", "RANK=4", "WORLD_SIZE=4"]),
        (TORCHRUN | {"LOCAL_RANK": "0"}, ["must be local rank 1, not 0", "LOCAL_RANK=0"]),
        (TORCHRUN | {"GROUP_RANK": "0"}, ["is on node 1", "GROUP_RANK=0"]),
        (TORCHRUN | {"RANK": "three"}, ["RANK='three' is not an integer"]),
        ({"RANK": "0"}, ["WORLD_SIZE is not set"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR and MASTER_PORT"]),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "5"}, ["SLURM_STEP_NUM_TASKS=5", "SLURM_STEP_NUM_NODES=2", "--ntasks-per-node"]),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, ["SLURM_STEP_TASKS_PER_NODE=3,1", "same number of ranks"]),
        (SRUN | {"SLURM_LAUNCH_NODE_IPADDR": ""}, ["neither MASTER_ADDR nor SLURM_LAUNCH_NODE_IPADDR"]),
        (SRUN | {"SLURM_HET_SIZE": "2"}, ["SLURM_HET_SIZE=2", "a heterogeneous job", "a job of one component"]),
        (SRUN | {"RANK": "1"}, ["RANK=1 contradicts SLURM_PROCID=3"]),
        (SRUN | {"WORLD_SIZE": "8"}, ["WORLD_SIZE=8 contradicts SLURM_STEP_NUM_TASKS=4"]),
        ({k: v for k, v in SUBMITIT_LOCAL.items() if k != "LOCKSTEP_RENDEZVOUS"}, ["SUBMITIT_LOCAL_NTASKS=2"]),
    ],
)
def test_contradiction_raises_error_that_names_the_variables(env: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        World.from_env(env)
    for word in words:
        assert word in str(raised.value)
