"""Which rank takes which GPU, on machines whose GPUs NVML reports here, and which CPUs are near them."""

import ctypes
import os
from typing import Any

import pytest
import torch

from lockstep.compat import nvml
from lockstep.core import LockstepError, World
from lockstep.distributed import gpus, local_devices

UUIDS = [f"GPU-{letter * 8}" for letter in "abcd"]


class Machine:
    """Pretends that this machine has four GPUs; torch then counts them as it does on a real one, without CUDA."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        patch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: len(UUIDS))
        patch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: UUIDS)
        patch.setattr(torch._C, "_cuda_getDeviceCount", self.ask_cuda)
        patch.setattr(gpus, "may_have_gpus", lambda: True)
        patch.setattr(gpus, "forked_after_cuda", lambda: False)
        patch.delenv("CUDA_VISIBLE_DEVICES")
        patch.delenv("CUDA_DEVICE_ORDER", raising=False)
        patch.delenv("SLURM_GPUS_ON_NODE", raising=False)

    def ask_cuda(self) -> int:
        """CUDA reads the environment once, and enumerates one MIG device at most."""
        self.patch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1)
        self.seen = os.environ["CUDA_VISIBLE_DEVICES"]
        return 1

    def devices(self, world: World, visible: str | None, accelerator: str = "auto", backend: str = "auto") -> str:
        """The device of each rank of this node, and what this rank sees."""
        if visible is not None:
            self.patch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = local_devices(world, accelerator, backend, os.environ)
        return f"{' '.join(map(str, found))}, {os.environ.get('CUDA_VISIBLE_DEVICES')}"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


LOCAL, AGENT = World(1, 2, 1, 2, launcher="local"), World(1, 2, 1, 2, launcher="agent")
NODES = World(3, 4, 1, 2, launcher="local")  # the second of two simulated nodes
BOUND = World(1, 2, 1, 2, launcher="slurm")


@pytest.mark.parametrize(
    ("world", "visible", "options", "expected"),
    [
        (World(), None, (), "cuda:0, None"),
        (World(), "2", (), "cuda:0, 2"),
        (World(), "", (), "cpu, "),
        (World(), "NoDevFiles", (), "cpu, NoDevFiles"),  # Slurm's word for none
        (LOCAL, None, (), "cuda:0 cuda:1, None"),
        (LOCAL, "3,1", (), "cuda:0 cuda:1, 3,1"),
        (LOCAL, "3,-1,1", (), "cpu cpu, 3,-1,1"),  # CUDA stops at the first that is not valid
        (LOCAL, "2,2", (), "cpu cpu, 2,2"),  # and accepts no repetition
        (LOCAL, "1,7", (), "cpu cpu, 1,7"),
        (LOCAL, f"{UUIDS[2]},{UUIDS[0]}", (), f"cuda:0 cuda:1, {UUIDS[2]},{UUIDS[0]}"),
        (LOCAL, "GPU-c,GPU-a", ("gpu",), "cuda:0 cuda:1, GPU-c,GPU-a"),
        (LOCAL, None, ("cpu",), "cpu cpu, None"),
        (LOCAL, "1", ("gpu", "gloo"), "cuda:0 cuda:0, 1"),
        (World(5, 6, 5, 6), None, ("cuda", "gloo"), "cuda:0 cuda:1 cuda:2 cuda:3 cuda:0 cuda:1, None"),
        (LOCAL, "1", ("auto", "gloo"), "cpu cpu, 1"),
        (AGENT, "0,1,2", (), "cuda:0 cuda:1, 0,1,2"),
        (BOUND, "1", ("gpu",), "cuda:0 cuda:0, 1"),  # srun has bound each task to one
        (NODES, None, ("gpu",), "cuda:0 cuda:1, 2,3"),
        (NODES, "3,2,1,0", (), "cuda:0 cuda:1, 1,0"),
        (NODES, ",".join(UUIDS), (), f"cuda:0 cuda:1, {UUIDS[2]},{UUIDS[3]}"),
        (NODES, "0,1,2", (), "cpu cpu, "),
        (AGENT, "MIG-a,MIG-b", (), "cuda:0 cuda:0, MIG-b"),
        (NODES, "MIG-a,MIG-b,MIG-c,MIG-d", ("gpu",), "cuda:0 cuda:0, MIG-d"),
        (LOCAL, "MIG-a", ("gpu", "gloo"), "cuda:0 cuda:0, MIG-a"),
        (LOCAL, "MIG-a", (), "cpu cpu, MIG-a"),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(
    machine: Machine, world: World, visible: str | None, options: tuple[str, ...], expected: str
) -> None:
    assert machine.devices(world, visible, *options) == expected
    if "MIG-" in (visible or ""):
        assert machine.seen == os.environ["CUDA_VISIBLE_DEVICES"]  # CUDA was not asked earlier
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize(
    ("visible", "options", "message"),
    [
        ("1", ("gpu",), "2 ranks on this node, but visible: 1 GPU; use fewer ranks or --trainer.accelerator cpu."),
        ("", ("cuda", "gloo"), "2 ranks on this node, but visible: 0 GPUs; use --trainer.accelerator cpu."),
        ("MIG-a", ("gpu",), "2 ranks on this node, but visible: 1 GPU; use fewer ranks"),
        ("0,1", ("cpu", "nccl"), "distributed.backend: 'nccl' needs GPUs, and the ranks use CPUs; remove it, or use gloo."),
        ("0,1", ("tpu",), "trainer.accelerator: 'tpu' is not valid"),
    ],
)
def test_what_cannot_be_is_refused(machine: Machine, visible: str, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(LockstepError) as refused:
        machine.devices(AGENT, visible, *options)
    assert refused.value.message.startswith(message)


def test_a_gpu_that_is_lost_does_not_make_a_job_train_on_the_cpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    with pytest.raises(LockstepError, match="Slurm has given 2 GPUs of this node to the job, but CUDA sees 1; see nvidia-smi"):
        machine.devices(AGENT, "1")
    assert machine.devices(AGENT, "1", "cpu") == "cpu cpu, 1"
    monkeypatch.setattr(gpus, "may_have_gpus", lambda: False)  # a pretended GPU, or a container without them
    assert machine.devices(World(0, 2, 0, 2, launcher="agent"), "") == "cpu cpu, "
    assert "Slurm has given 2 GPUs of this node to the job, but CUDA sees none; training on the CPU" in caplog.text


def test_a_module_that_initializes_cuda_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "forked_after_cuda", lambda: True)
    with pytest.raises(LockstepError, match="A module that the config names initializes CUDA when it is imported"):
        machine.devices(LOCAL, "0,1")
    assert machine.devices(LOCAL, "0,1", "cpu") == "cpu cpu, 0,1"
    monkeypatch.setattr(gpus, "may_have_gpus", lambda: False)
    assert machine.devices(LOCAL, "") == "cpu cpu, "


class FakeNvml:
    """NVML of a machine with two GPUs, the first near CPUs 0 to 7, the second near 64 to 71."""

    def nvmlInit_v2(self) -> int:
        return 0

    nvmlShutdown = nvmlInit_v2

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:
        device._obj.value = index + 1
        return 2 * (index > 1)  # NVML_ERROR_INVALID_ARGUMENT

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:
        device._obj.value = {b"GPU-aaaa": 1, b"GPU-bbbb": 2}.get(uuid, 0)
        return 0 if device._obj.value else 6  # NVML_ERROR_NOT_FOUND

    def nvmlDeviceGetCpuAffinity(self, device: Any, count: int, words: Any) -> int:
        assert count == len(words) == 3
        words[device.value - 1] = 255
        return 0


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, [0, 64]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [64]),
        ({"CUDA_VISIBLE_DEVICES": "1, 0"}, [64, 0]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bbbb,GPU-aaaa"}, [64, 0]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-cccc"}, []),  # not told: all CPUs are shared out equally
        ({"CUDA_VISIBLE_DEVICES": "0,5"}, []),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_cpus_near_the_visible_gpus(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], expected: list[int]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml())
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert nvml.cpus_near_gpus(env) == [set(range(first, first + 8)) for first in expected]
