"""What touches a batch, a loss or a checkpoint, on tensors of a CUDA device that have no content, and so need no GPU."""

import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from support.forks import run_forked
from torch import nn

from lockstep.checkpoint.serialization import copy_to_cpu
from lockstep.checkpoint.weight_sums import weight_sums
from lockstep.cli import local
from lockstep.compat.torch import fake_tensors
from lockstep.config import DDPOptions
from lockstep.core import World
from lockstep.data.loading import DataSharding
from lockstep.data.synthetic import Synthetic
from lockstep.models.classifier import ClassificationMetrics, Classifier
from lockstep.models.networks import ConvNet
from lockstep.models.optimizers import make_optimizer, parameter_groups
from lockstep.monitoring.classifier_media import count_predictions
from lockstep.monitoring.nan_guard import NanGuard
from lockstep.strategies.ddp import DDP, SingleDevice
from lockstep.strategies.stand_in import without_weight

GPU = torch.device("cuda", 0)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make: Any = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs))  # needs a driver
    with fake_tensors():
        yield


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_stays_on_the_device(fake_gpu: None, channels_last: bool) -> None:
    data = Synthetic(shape=(1, 8, 8), classes=4)
    with GPU:
        model = Classifier(ConvNet(1, 4, [8]), num_classes=4)
    model.memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.empty(6, 1, 8, 8, dtype=torch.uint8, device=GPU)
    images, labels = data.on_after_batch_transfer((images, torch.empty(6, dtype=torch.int64, device=GPU)), 0)
    loss, logits = model._score((images, labels), "train")
    for parameter in model.parameters():  # backward itself would need CUDA
        parameter.grad = torch.empty_like(parameter)
    optimizer = make_optimizer("adamw", parameter_groups(model, 0.1), 0.1, True, {})
    optimizer.step()
    assert {value.device for state in optimizer.state.values() for value in state.values()} == {GPU}
    counts = torch.zeros(4, 4, dtype=torch.int64, device=GPU)
    count_predictions(counts, labels, logits)
    guard = NanGuard()
    trainer: Any = SimpleNamespace(global_step=1, world_size=1, global_rank=0, log_every_n_steps=0)
    guard.on_train_batch_end(trainer, model, without_weight(loss), None, 0)
    guard._check_own()
    scores = model.scores["train_scores"]
    assert isinstance(scores, ClassificationMetrics) and guard._first_bad is not None
    for value in (loss, logits, images, counts, guard._first_bad, *scores.reduce_and_reset(lambda total: total).values()):
        assert value.device == GPU


def test_a_checkpoint_is_on_the_cpu_and_its_checksums_on_the_device(fake_gpu: None) -> None:
    filters = torch.empty(2, 3, 4, 4, device=GPU).to(memory_format=torch.channels_last)
    others = [torch.empty(shape, dtype=kind, device=GPU) for shape, kind in (((), torch.float32), (7, torch.bool))]
    copied = copy_to_cpu({"filters": filters, "others": others})
    assert copied["filters"].device.type == "cpu" and copied["filters"].stride() == filters.stride()
    assert [value.device.type for value in copied["others"]] == ["cpu", "cpu"]
    assert weight_sums([filters, *others, None]).shape == (4,)


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_that_is_restored_from_the_cpu_steps_on_the_device(fake_gpu: None, fused: bool) -> None:
    """The step of a fused optimizer must be on the device, of another one on the CPU, where reading it waits for nothing."""

    def trained() -> Any:
        parameter = nn.Parameter(torch.empty(4, 3, 3, 3, device=GPU).to(memory_format=torch.channels_last))
        parameter.grad = torch.empty_like(parameter)
        return make_optimizer("adamw", [{"params": [parameter]}], 0.1, fused, {})

    saved = trained()
    saved.step()
    strategy: Any = SingleDevice(GPU, None)  # type: ignore[arg-type]
    strategy._optimizers = [trained()]
    strategy.load_optimizer_state_dict({"optimizer_states": [copy_to_cpu(saved.state_dict())]})
    restored = strategy.optimizers[0]
    for parameter, state in restored.state.items():
        assert state["step"].device.type == ("cuda" if fused else "cpu")
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].device == GPU and state[key].stride() == parameter.stride()
    restored.step()


def test_the_device_is_idle_while_ddp_wraps_the_module_in_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last optimizer step may still write to the weights that rank zero sends, if it is wrapped again in training."""
    calls: list[str] = []
    monkeypatch.setattr(DDPStrategy, "configure_ddp", lambda self: calls.append("wrap"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"wait for {device}"))
    strategy = DDP([GPU], DataSharding(World(), 1), DDPOptions(), timedelta(minutes=1))
    strategy._lightning_module = LightningModule()
    strategy.configure_ddp()
    assert calls == ["wait for cuda:0", "wrap", "wait for cuda:0"]


def run_and_watch(arguments: Sequence[str]) -> int:
    """Train with two ranks; exit with 3 if this process, which forks them, has asked CUDA for anything."""
    mine, asked = os.getpid(), list[str]()
    for name in ("_cuda_getDeviceCount", "_cuda_init", "_accelerator_getAccelerator"):
        real = getattr(torch._C, name)

        def ask(*args: Any, name: str = name, real: Any = real) -> Any:
            if os.getpid() == mine:
                asked.append(name)
            return real(*args)

        setattr(torch._C, name, ask)
    torch.cuda._raw_device_count_nvml = lambda: int(os.getpid() == mine)
    os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "CUDA_VISIBLE_DEVICES": "0"}  # the first as Lightning sets it
    for module in ("trainer.preload", "strategies.factory", "distributed.gpus"):
        vars(import_module(f"lockstep.{module}"))["may_have_gpus"] = lambda: True
    vars(import_module("lockstep.distributed.gpus"))["forked_after_cuda"] = lambda: False  # another test may have asked
    status = local.main(arguments)
    print(asked, file=sys.stderr)
    return 3 if asked else status


def test_the_process_that_forks_ranks_does_not_ask_cuda(tmp_path: Path) -> None:
    """A rank that is forked from one that has cannot use its GPU."""
    ran = run_forked(run_and_watch, "--ranks", "2", "--trainer.fast_dev_run", "true", f"--run.root={tmp_path}")
    assert ran.returncode == 0, ran.stderr
