"""Offload to NVMe, and the ops that need a compiler.

Cheapest first: folders and ops without training, then runs of real ranks over gloo. Compiling DeepSpeed's async_io takes
minutes, unless ~/.cache/torch_extensions or TORCH_EXTENSIONS_DIR has it.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.deepspeed_runs import RUN, zero
from support.faults import fault
from support.forks import run_forked
from support.runs import REPO, Launch, assert_same_run, resume_run

from lockstep import cli
from lockstep.core.world import World
from lockstep.distributed.process_group import destroy_process_group, init_process_group
from lockstep.distributed.ranks import RankFailed, fork_ranks
from lockstep.strategies import deepspeed_ops, preload
from lockstep.strategies.deepspeed_nvme import private_folder
from lockstep.strategies.deepspeed_ops import Op, load_ops
from lockstep.trainer.session import main

has_all = shutil.which("c++") is not None and Path("/usr/include/libaio.h").exists()
needs_compiler = pytest.mark.skipif(
    not has_all and "LOCKSTEP_REQUIRE_SLURM" not in os.environ, reason="g++ or libaio-dev is missing; make ops installs them"
)
pytestmark = pytest.mark.timeout(900)  # async_io may have to be compiled first


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import DeepSpeed once, before ranks are forked."""
    preload("deepspeed")


@pytest.fixture(autouse=True)
def one_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile with one process, because other tests with time limits run at the same time."""
    monkeypatch.setenv("MAX_JOBS", "1")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to offload to, and beside it a JSON that offloads even small parameters."""
    folder = tmp_path_factory.mktemp("disk")
    own = {"sub_group_size": 300_000, "offload_param": {"max_in_cpu": 0, "buffer_size": 1_000_000}}
    folder.with_suffix(".json").write_text(json.dumps({"zero_optimization": own}))
    return folder


def nvme(disk: Path, parameters: str = "nvme") -> list[str]:
    """Arguments that offload the optimizer to NVMe, and the parameters to ``parameters``."""
    offload = ["--deepspeed.offload_optimizer", "nvme", "--deepspeed.offload_param", parameters]
    return [*zero(3, 2), *offload, "--deepspeed.nvme_path", str(disk), "--deepspeed.config", str(disk.with_suffix(".json"))]


WIDE = (*RUN, "--model.network.hidden", "[800,700]", "--trainer.max_epochs", "2", "--trainer.gradient_clip_val", "1")
"""Each of two ranks has more than 1 MiB of the largest layer; DeepSpeed offloads nothing smaller."""


def test_a_folder_is_removed_with_its_rank_or_by_the_next_one(tmp_path: Path) -> None:
    def wait(_: World) -> None:
        with private_folder(tmp_path, World()):
            time.sleep(600)

    process = multiprocessing.get_context("fork").Process(target=wait, args=(World(),))
    process.start()
    while not (left := list(tmp_path.glob("lockstep-*"))):
        time.sleep(0.01)
    with private_folder(tmp_path, World()) as folder:
        assert folder is not None and {folder, *left} == set(tmp_path.iterdir())
    process.kill()
    process.join()
    assert list(tmp_path.iterdir()) == left
    with private_folder(tmp_path, World()) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []


def load_on(world: World) -> None:
    init_process_group(world, torch.device("cpu"), timedelta(seconds=60))
    load_ops([Op("CPUAdamBuilder", "model.optimizer", "mine", "use adamw")], world, torch.device("cpu"))
    destroy_process_group()


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which the compiler logs its calls; no op is compiled yet, and cpu_adam is replaced by a small one."""
    diary, compiler = tmp_path / "compiled", tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) echo "$@" >> {diary};; esac\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    (tmp_path / "small.cpp").write_text(
        '#include <Python.h>\nstatic PyModuleDef about = {PyModuleDef_HEAD_INIT, "cpu_adam"};\n'
        "PyMODINIT_FUNC PyInit_cpu_adam(void) { return PyModule_Create(&about); }\n"
    )
    builder = importlib.import_module("deepspeed.ops.op_builder.cpu").CPUAdamBuilder
    monkeypatch.setattr(builder, "sources", lambda _: [str(tmp_path / "small.cpp")])
    monkeypatch.setenv("PATH", f"{compiler.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    return diary


@needs_compiler
def test_an_op_is_built_once(compiled: Path) -> None:
    fork_ranks(load_on, 2, 2)
    assert len(compiled.read_text().splitlines()) == 1
    fork_ranks(load_on, 1, 2)
    assert len(compiled.read_text().splitlines()) == 1


@needs_compiler
def test_environments_with_the_same_versions_share_an_op(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_ranks(load_on, 1, 1)
    (tmp_path / "elsewhere").mkdir()
    source = shutil.copy(tmp_path / "small.cpp", tmp_path / "elsewhere")
    builder = importlib.import_module("deepspeed.ops.op_builder.cpu").CPUAdamBuilder
    monkeypatch.setattr(builder, "sources", lambda _: [source])
    fork_ranks(load_on, 1, 2)
    assert len(compiled.read_text().splitlines()) == 1
    monkeypatch.setattr("deepspeed.__version__", "0")
    fork_ranks(load_on, 1, 2)
    assert len(compiled.read_text().splitlines()) == 2


@needs_compiler
def test_all_ranks_report_an_op_that_does_not_compile(compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "small.cpp").write_text("no\n")
    with pytest.raises(RankFailed) as failed:
        fork_ranks(load_on, 1, 2)
    failure = failed.value.failure
    assert failure.is_permanent and failure.exit_status == 2
    assert "model.optimizer: 'mine' needs DeepSpeed's op cpu_adam, which cannot be compiled or loaded on " in failure.report
    assert "small.cpp:1:1: error: " in failure.report and failure.report.endswith("or use adamw.")


NVME = ["--strategy", "deepspeed", "--deepspeed.stage", "3", "--deepspeed.offload_optimizer", "nvme"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (NVME, "deepspeed.nvme_path: must be set for deepspeed.offload_optimizer: nvme; give a folder"),
        ([*NVME, "--deepspeed.nvme_path", "/proc/no"], "deepspeed.nvme_path: /proc/no does not exist; give an existing"),
        (
            [*NVME, "--deepspeed.nvme_path", "/tmp", "--deepspeed.stage", "2"],
            "deepspeed.offload_optimizer: 'nvme' needs deepspeed.stage 3; it is 2.",
        ),
        (
            [*NVME, "--deepspeed.nvme_path", "/tmp", "--deepspeed.offload_optimizer", "cpu"],
            "deepspeed.nvme_path: /tmp is not used: neither deepspeed.offload_optimizer nor deepspeed.offload_param is",
        ),
    ],
)
def test_contradictory_options_are_refused(
    launch: Launch, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert launch(*arguments).status == 2
    assert capfd.readouterr().err.startswith(f"lockstep: {message}")


def test_each_rank_checks_the_folder_which_a_login_node_need_not_have(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["--config", str(REPO / "configs/digits.yaml"), *NVME, "--run.root", str(tmp_path / "runs")]
    submit = [sys.executable, str(REPO / "launch/slurm.py"), *told, "--deepspeed.nvme_path", "/proc/nowhere"]
    assert "sbatch" in subprocess.run(submit, capture_output=True, text=True, env={"PATH": "/nowhere"}).stderr
    monkeypatch.setattr("lockstep.trainer.session.load_ops", lambda *_: None)
    for place, problem in (("/proc/nowhere", "/proc/nowhere does not exist on "), ("/proc", "/proc cannot be written on ")):
        train = multiprocessing.get_context("fork").Process(
            target=lambda place=place: sys.exit(main([*told, "--deepspeed.nvme_path", place], {}))
        )
        train.start()
        train.join()
        assert train.exitcode == 2
        assert f"lockstep: deepspeed.nvme_path: {problem}" in capfd.readouterr().err


def test_a_missing_compiler_is_reported_once(tmp_path: Path) -> None:
    run = [sys.executable, str(REPO / "launch/local.py"), *NVME, "--ranks", "2", "--deepspeed.nvme_path", str(tmp_path)]
    env = {"PATH": "/nowhere", "HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops"), "WANDB_MODE": "disabled"}
    failed = subprocess.run([*run, "--run.root", str(tmp_path / "runs")], capture_output=True, text=True, env=env)
    assert failed.returncode == 2
    told = [line for line in failed.stderr.splitlines() if "lockstep: " in line]
    assert len(told) == 1
    assert told[0].startswith(
        "lockstep: deepspeed.offload_optimizer: 'nvme' needs DeepSpeed's op async_io, which is compiled at"
    )
    assert ", and c++ is missing on " in told[0]
    assert told[0].endswith("install it (apt-get install g++ libaio-dev), or use cpu.")


def test_a_missing_nvcc_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would begin to compile, and end with a message about a path that is not a text."""
    accelerator = SimpleNamespace(device_name=lambda: "cuda")
    monkeypatch.setattr(importlib.import_module("deepspeed.accelerator"), "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(importlib.import_module("torch.utils.cpp_extension"), "CUDA_HOME", None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(deepspeed_ops, "_is_installed", lambda name: False)
    for_gpus = importlib.import_module("deepspeed.ops.op_builder.fused_adam").FusedAdamBuilder
    monkeypatch.setattr(importlib.import_module("deepspeed.ops.op_builder"), "FusedAdamBuilder", for_gpus)
    monkeypatch.setattr(for_gpus, "load", lambda self, verbose: None)
    found = deepspeed_ops._load(Op("FusedAdamBuilder", "model.optimizer", "deepspeed.ops.adam.FusedAdam", "use adamw or sgd"))
    assert "op fused_adam, which is compiled at first use, and nvcc is missing on " in found
    assert found.endswith(f"; install the CUDA toolkit {torch.version.cuda}, or use adamw or sgd.")


@needs_compiler
@pytest.mark.parametrize(
    ("parameters", "more"),
    [("nvme", []), ("cpu", ["--trainer.precision", "bf16-mixed", "--checkpoint.async_save", "false"])],
)
def test_offload_to_nvme_resumes_bit_for_bit(
    launch: Launch, tmp_path: Path, disk: Path, parameters: str, more: list[str]
) -> None:
    in_memory = ["--deepspeed.offload_optimizer", "cpu", "--deepspeed.config", str(disk.with_suffix(".json"))]
    undisturbed = launch(*WIDE, *zero(3, 2), *more, *in_memory)
    run = launch(*WIDE, *nvme(disk, parameters), *more, *fault(tmp_path / "once", "SIGKILL", step=17, rank=1))
    assert run.status == 1
    left = {file.name for file in disk.glob("lockstep-*/zero_stage_3/**/*.swp")}  # of the killed rank
    assert {"exp_avg-0_2.tensor.swp", "0_2.tensor.swp"} <= left
    assert ("2_param.tensor.swp" in left) == (parameters == "nvme")
    assert_same_run(resume_run(launch, run), undisturbed)
    assert list(disk.iterdir()) == []


@needs_compiler
def test_from_nvme_to_ddp_and_back(launch: Launch, tmp_path: Path, disk: Path) -> None:
    wide = (
        "--model",
        "support.toy_model.WideAndFrozen",
        "--data",
        "support.toy_model.ToyData",
        "--data.samples",
        "120",
        "--trainer.max_epochs",
        "3",
        "--checkpoint.every_n_steps",
        "6",
    )
    ddp = launch(*wide, "--ranks", "2")
    run = launch(*wide, *nvme(disk), *fault(tmp_path / "0", "SIGTERM", step=5))
    resume_run(launch, run, "--strategy", "ddp", *fault(tmp_path / "1", "SIGTERM", step=14))
    assert resume_run(launch, run, *nvme(disk)).status == 0
    assert run.series("val/loss") == pytest.approx(ddp.series("val/loss"), abs=1e-5)
    out = tmp_path / "weights.safetensors"
    assert run_forked(cli.main, "export", str(run.folder), "--out", str(out)).returncode == 0
    weights = load_file(out)
    assert weights.keys() == ddp.weights.keys()
    for name, value in ddp.weights.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)
