"""Sizes as text, plans of the launcher, and estimates compared with the memory of real gloo ranks."""

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import memory
import pytest
import torch
from support.forks import run_forked
from support.runs import REPO, Launch

from lockstep.cli import submit
from lockstep.core import format_bytes
from lockstep.core.errors import UsageError
from lockstep.models.networks import MLP
from lockstep.planning import command
from lockstep.planning.memory import ModelProfile, TrainingOptions
from lockstep.planning.model_profile import profile_model
from lockstep.planning.table import Plan, Resources
from lockstep.slurm.submission import preflight
from lockstep.slurm.submission.profile import parse_size
from lockstep.trainer.config_parser import parse_config

PLAN = ("--plan", "--gpus-per-node", "2")


def plan(*arguments: str, cwd: Path = REPO) -> "subprocess.CompletedProcess[str]":
    """Run ``launch/slurm.py --plan`` for one node of two GPUs."""
    return subprocess.run(
        [sys.executable, str(REPO / "launch/slurm.py"), *PLAN, *arguments], capture_output=True, text=True, cwd=cwd
    )


def plan_forked(*arguments: str, cwd: Path = REPO) -> "subprocess.CompletedProcess[str]":
    """The same, but what the launcher runs in a new process runs in a fork, which need not import torch."""

    def run_module(arguments: list[str], env: Mapping[str, str], **_: object) -> "subprocess.CompletedProcess[str]":
        assert arguments[:3] == [sys.executable, "-m", "lockstep.planning.command"]
        return run_forked(command.main, *arguments[3:], cwd=cwd, env=env)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "subprocess", SimpleNamespace(run=run_module))
        return run_forked(submit.main, *PLAN, *arguments, cwd=cwd)


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
        ("80G", "Use --strategy ddp: 646 MiB of 80.0 GiB per rank."),
        ("600M", "Use --strategy deepspeed --deepspeed.stage 1: 485 MiB of 600 MiB per rank."),
        ("450M", "Nothing fits on 1 node; use --nodes 2 with --strategy deepspeed --deepspeed.stage 1."),
        ("10M", "Nothing fits; use a smaller batch (and accumulate gradients), or activation_checkpointing."),
    ],
)
def test_recommendation(memory: str, advice: str) -> None:
    planned = plan_forked("--gpu-memory", memory, "--mem", "500M", *LARGE)
    assert planned.returncode == 0 and planned.stderr == ""
    assert planned.stdout.startswith("33,869,834 parameters, 33,869,834 of them trained, in bf16-mixed")
    assert advice in planned.stdout


def test_a_plan_names_what_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text((REPO / "tests/support/toy_model.py").read_text() + _LATER)
    own = ("--model", "mine.ToyModel", "--data", "mine.Later", "--config", str(REPO / "configs/deepspeed_zero2.yaml"))
    planned = plan(*own, cwd=tmp_path)
    assert planned.returncode == 0
    assert planned.stderr.endswith(
        "activations are unknown: cannot read a sample of the data (FileNotFoundError: not there yet)\n"
    )
    assert "Set gpu_memory (--gpu-memory 80G) in the profile to see what fits." in planned.stdout
    assert not list(tmp_path.glob("runs"))


_LATER = """
class Later(ToyData):
    def setup(self, stage):
        raise FileNotFoundError("not there yet")
"""


def test_nothing_fits_for_sure_while_activations_are_unknown() -> None:
    model = ModelProfile([1 << 28], [[1 << 28]], 0, {2: 4.0, 4: 8.0, 8: 16.0}, is_fused=True, global_batch=32)
    plan = Plan(model, Resources(1, 2, True, 3 << 30), TrainingOptions("32-true"))
    assert {row.strategy: row.obstacle for row in plan.rows if row.nodes == 1} == {
        **{"ddp": "no", "zero1": "no", "zero2": "no"},
        **{"zero3": "no", "zero3_offload": None},
    }
    assert plan.recommendation() == "Use the first strategy that leaves room for the activations, whose size is unknown."


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
            ["--model", "support.toy_model.TwoOptimizers", "--data", "support.toy_model.ToyData"],
            "--plan supports modules with one optimizer; this one has 2.",
        ),
        (["--data.batch_size", "63"], "data.batch_size: the global batch size 63 is not divisible by 2 ranks; use 62 or 64."),
    ],
)
def test_plans_that_are_refused(arguments: list[str], message: str) -> None:
    planned = plan_forked(*arguments, cwd=REPO / "tests")
    assert planned.returncode == 2 and planned.stdout == ""
    assert planned.stderr.startswith(f"lockstep: {message}") and planned.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def model() -> ModelProfile:
    """Profile of the model below, measured in a fork: a process that has run backward cannot fork ranks."""
    pool = multiprocessing.get_context("fork").Pool(1)
    with pool:
        found: ModelProfile = pool.apply(profile_of_the_benchmark)
    pool.join()
    return found


def profile_of_the_benchmark() -> ModelProfile:
    """Profile the model that benchmarks/memory.py trains."""
    return profile_model(parse_config([*memory.RUN, "32-true"])[1], "32-true")


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("ddp", 2), ("zero1", 2), ("zero1", 4), ("zero2", 4), ("zero3", 1), ("zero3", 2), ("zero3", 4)]
)
def test_each_rank_holds_what_was_planned(
    launch: Launch, model: ModelProfile, tmp_path: Path, strategy: str, ranks: int
) -> None:
    record = ("--trainer.callbacks+=memory.MemoryRecorder", f"--trainer.callbacks.folder={tmp_path}")
    assert launch("--ranks", str(ranks), *memory.RUN, "32-true", *memory.STRATEGIES[strategy], *record).status == 0
    planned = memory.estimate(model, "32-true", strategy, ranks)
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
    # Backward also holds the gradients of a layer's input and output.
    assert kept <= model.activations["ddp"].for_batch(batch) <= kept + 2.5 * 4 * 512 * batch
