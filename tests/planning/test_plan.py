"""What --plan says is what ranks hold: sizes as text, plans of the launcher, and the memory of real gloo ranks."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import memory
import pytest
import torch
from support.runs import REPO, Launch

from lockstep.config.schema import DDPOptions, DeepSpeedOptions
from lockstep.core.errors import UsageError
from lockstep.models.networks import MLP
from lockstep.planning.fake_step import profile_model
from lockstep.planning.memory import ModelProfile
from lockstep.planning.table import Plan, Resources, format_bytes
from lockstep.slurm.submission.profile import parse_size
from lockstep.trainer.config_parser import parse_config


def plan(*arguments: str, cwd: Path = REPO) -> "subprocess.CompletedProcess[str]":
    """``launch/slurm.py --plan`` of one node of two GPUs."""
    command = [sys.executable, str(REPO / "launch/slurm.py"), "--plan", "--gpus-per-node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_sizes() -> None:
    assert [parse_size(size) for size in ("80G", "512", "1T", "64gb")] == [80 << 30, 512 << 20, 1 << 40, 64 << 30]
    assert [format_bytes(size) for size in (80 << 30, 1536 << 20, 100 << 10, 12, 0, None)] == [
        *("80.0 GiB", "1.5 GiB", "100 KiB", "12 B", "0", "?"),
    ]
    with pytest.raises(UsageError, match="'much' is not a size"):
        parse_size("much")


LARGE = ("--model.network", "lockstep.models.MLP", "--model.network.hidden", "[4096,4096,4096]")
"""34 million parameters: DDP needs 512 MiB and more."""


@pytest.mark.parametrize(
    ("memory", "advice"),
    [
        ("80G", "Take --strategy ddp: 646 MiB of 80.0 GiB on each rank."),
        ("600M", "Take --strategy deepspeed --deepspeed.stage 1: 485 MiB of 600 MiB on each rank."),
        ("450M", "Nothing fits on 1 node; take --nodes 2 with --strategy deepspeed --deepspeed.stage 1."),
        ("10M", "Nothing fits; take a smaller batch (and accumulate gradients), or activation_checkpointing."),
    ],
)
def test_which_to_take(memory: str, advice: str) -> None:
    planned = plan("--gpu-memory", memory, "--mem", "500M", *LARGE)
    assert planned.returncode == 0 and planned.stderr == ""
    assert planned.stdout.startswith("33,869,834 parameters, 33,869,834 of them trained, in bf16-mixed")
    assert advice in planned.stdout


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text((REPO / "tests/support/fault_callbacks.py").read_text() + _LATER)
    own = ("--model", "mine.Own", "--data", "mine.Later", "--config", str(REPO / "configs/deepspeed_zero2.yaml"))
    planned = plan(*own, cwd=tmp_path)
    assert planned.returncode == 0
    assert planned.stderr.endswith(
        "activations are not known: no sample of the data could be read (FileNotFoundError: not there yet)\n"
    )
    assert "To be told what fits, set gpu_memory (--gpu-memory 80G) in the profile." in planned.stdout
    assert not list(tmp_path.glob("runs"))


_LATER = """
class Later(Points):
    def setup(self, stage):
        raise FileNotFoundError("not there yet")
"""


def test_nothing_is_said_to_fit_without_its_activations() -> None:
    model = ModelProfile([1 << 28], [[1 << 28]], 0, {2: 4.0, 4: 8.0, 8: 16.0}, True, {}, batch=32)
    plan = Plan(model, Resources(1, 2, True, 3 << 30), "32-true", DDPOptions(), DeepSpeedOptions())
    assert {row.strategy: row.obstacle for row in plan.rows if row.nodes == 1} == {
        **{"ddp": "no", "zero1": "no", "zero2": "no"},
        **{"zero3": "no", "zero3_offload": None},
    }
    assert plan.advice() == "Take the first that leaves room for the activations, which are not known."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "0G"], "gpu_memory: '0G' must be more than 0."),
        (
            ["--model.optimizer", "deepspeed.ops.adam.FusedAdam"],
            "model.optimizer: 'deepspeed.ops.adam.FusedAdam' is compiled at",
        ),
        (
            ["--gpu-memory", "much"],
            "gpu_memory: 'much' is not a size; write a number with the suffix K, M, G or T, such as 80G.",
        ),
        (
            ["--activation_checkpointing", "[torch.nn.Linea]"],
            "activation_checkpointing: torch.nn.Linea does not exist; did you mean 'torch.nn.Linear'",
        ),
        (
            ["--model", "support.fault_callbacks.TwoOptimizers", "--data", "support.fault_callbacks.Points"],
            "--plan is for a module with one optimizer; this one has 2.",
        ),
        (["--data.batch_size", "63"], "data.batch_size: the global batch size 63 is not divisible by 2 ranks."),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], message: str) -> None:
    planned = plan(*arguments, cwd=REPO / "tests")
    assert planned.returncode == 2 and planned.stdout == ""
    assert planned.stderr.startswith(f"lockstep: {message}") and planned.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def model() -> ModelProfile:
    """That of the runs below; found in a fork, since whoever has run backward cannot fork ranks."""
    pool = multiprocessing.get_context("fork").Pool(1)
    with pool:
        found: ModelProfile = pool.apply(of_the_benchmark)
    pool.join()
    return found


def of_the_benchmark() -> ModelProfile:
    """What benchmarks/memory.py measures."""
    return profile_model(parse_config([*memory.RUN, "32-true"])[1], "32-true")


@pytest.mark.parametrize(
    ("way", "ranks"), [("ddp", 2), ("zero1", 2), ("zero1", 4), ("zero2", 4), ("zero3", 1), ("zero3", 2), ("zero3", 4)]
)
def test_each_rank_holds_what_was_planned(launch: Launch, model: ModelProfile, tmp_path: Path, way: str, ranks: int) -> None:
    watch = ("--trainer.callbacks+=memory.Held", f"--trainer.callbacks.folder={tmp_path}")
    assert launch("--ranks", str(ranks), *memory.RUN, "32-true", *memory.WAYS[way], *watch).status == 0
    planned = memory.planner(model, "32-true")(way, ranks)
    for rank in range(ranks):
        held = json.loads((tmp_path / f"{rank}.json").read_text())
        assert held["weights"] == pytest.approx(planned.weights, rel=0.1)
        assert held["optimizer"] == pytest.approx(planned.optimizer, rel=0.1)
        assert held["gradients"] <= 1.1 * planned.gradients


def test_activations_are_those_of_a_real_step(model: ModelProfile) -> None:
    network, batch = MLP(hidden=[512] * 10), 4096
    own, saved = {p.untyped_storage().data_ptr() for p in network.parameters()}, dict[int, torch.UntypedStorage]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        saved[memory.data_ptr()] = memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.zeros(batch, 1, 8, 8))
    kept = sum(memory.nbytes() for address, memory in saved.items() if address not in own)
    # In backward there are the gradients of a layer's input and output beside it.
    assert kept <= model.activations["ddp"].of(batch) <= kept + 2.5 * 4 * 512 * batch
