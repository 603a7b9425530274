"""Offload to NVMe never trains on without its reads: with stand-ins for DeepSpeed's objects, and no compiler."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import lockstep.compat.deepspeed
from lockstep.config.deepspeed import check_offload
from lockstep.config.schema import DeepSpeedOptions
from lockstep.core.errors import LockstepError, RunError, UsageError


def compat_at(optimize: int) -> Any:
    """``lockstep.compat.deepspeed``, compiled as by ``python`` (0) or ``python -O`` (1)."""
    path = Path(lockstep.compat.deepspeed.__file__)
    module = ModuleType("compat_deepspeed")
    exec(compile(path.read_text(), str(path), "exec", optimize=optimize), vars(module))
    return module


class Handle:
    """Fills a tensor with ones, but not before ``wait``; some of the reads may fail."""

    def __init__(self, finished: int) -> None:
        self.finished = finished
        self.started: list[torch.Tensor] = []

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return False

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        self.started.append(tensor)
        return 0

    def wait(self) -> int:
        for tensor in self.started:
            tensor.fill_(1)
        return self.finished


def read_gradients(compat: Any, finished: int) -> torch.Tensor:
    gradients = {n: SimpleNamespace(offset=10 * n, length=5, path=f"{n}.swp") for n in range(2)}
    swapper = SimpleNamespace(
        swap_params_info={7: SimpleNamespace(swapped_gradients=gradients)}, parameter_id=lambda parameter: 7
    )
    target = torch.zeros(20)
    compat._read_gradients(swapper, Handle(finished), None, target)
    return target


@pytest.mark.parametrize("optimize", [0, 1])
def test_gradients_are_waited_for_also_under_python_o(optimize: int) -> None:
    assert read_gradients(compat_at(optimize), finished=2).tolist() == ([1] * 5 + [0] * 5) * 2


@pytest.mark.parametrize("optimize", [0, 1])
def test_a_failed_read_of_gradients_ends_the_run(optimize: int) -> None:
    with pytest.raises(RunError, match=r"deepspeed\.nvme_path: 1 of 2 gradients were read; check the disk"):
        read_gradients(compat_at(optimize), finished=1)


def test_nvme_is_refused_under_python_o() -> None:
    with pytest.raises(UsageError, match="offload to NVMe does not work under python -O"):
        compat_at(1).patch_nvme()


def test_nvme_is_refused_with_another_version_of_deepspeed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = DeepSpeedOptions(stage=3, offload_optimizer="nvme", nvme_path=tmp_path)
    check_offload(options)
    monkeypatch.setattr("lockstep.compat.installed_version", lambda library: "0.19.9")
    with pytest.raises(UsageError) as refused:
        check_offload(options)
    assert str(refused.value) == (
        "deepspeed.offload_optimizer: 'nvme' needs deepspeed 0.19.8, the only version it was tested with; "
        "0.19.9 is installed: pip install deepspeed==0.19.8"
    )
    check_offload(DeepSpeedOptions(stage=3, offload_optimizer="cpu"))


@pytest.mark.parametrize("name", ["swap_in_tensors", "swap_out_tensors"])
def test_a_patch_of_a_name_that_is_gone_fails(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original: Callable[[str], Any] = lockstep.compat.deepspeed.import_module
    changed = ModuleType("utils")
    vars(changed).update({"swap_in_tensors": None, "swap_out_tensors": None})
    delattr(changed, name)

    def stand_in(module: str) -> Any:
        found = original(module) if module.startswith("deepspeed.runtime.zero") else ModuleType(module)
        vars(found).update({"swap_in_tensors": None, "swap_out_tensors": None})
        return changed if module.endswith(".utils") else found

    compat = compat_at(0)
    monkeypatch.setattr(compat, "import_module", stand_in)
    with pytest.raises(LockstepError, match=rf"deepspeed \S+ has no utils\.{name}, which lockstep needs"):
        compat.patch_nvme()
