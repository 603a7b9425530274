"""The shared classifier: metrics over ranks and uneven batches, networks, and no wait for the device between logged steps.

Forked ranks, then single modules, then short runs.
"""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from support.runs import SMALL, Launch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lockstep.config.schema import DDPOptions, DistributedOptions
from lockstep.core.errors import UsageError
from lockstep.core.world import World
from lockstep.data.loading.sharding import DataSharding
from lockstep.distributed.process_group import destroy_process_group, init_process_group
from lockstep.distributed.ranks import fork_ranks
from lockstep.models.classifier import ClassificationMetrics, Classifier
from lockstep.models.networks import make_torchvision_model
from lockstep.strategies.factory import make_strategy
from lockstep.trainer.loops import replace_loops


def score_in_parts(world: World) -> dict[str, float]:
    """Loss, accuracy and counts of 13 samples, unevenly sharded, in batches of at most 2."""
    init_process_group(world, torch.device("cpu"), timedelta(seconds=30))
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(13, 5, generator=generator), torch.randint(0, 5, (13,), generator=generator)
    scores = ClassificationMetrics()
    shard = torch.arange(13).tensor_split(world.size)[world.rank]
    for batch in (shard[start : start + 2] for start in range(0, len(shard), 2)):
        scores.update(nn.functional.cross_entropy(logits[batch], labels[batch]), logits[batch], labels[batch])

    def reduce(total: torch.Tensor) -> torch.Tensor:
        if world.size > 1:
            torch.distributed.all_reduce(total)
        return total

    found = {name: float(value) for name, value in scores.reduce_and_reset(reduce).items()}
    destroy_process_group()
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_loss_and_accuracy_weigh_each_sample_equally_on_any_number_of_ranks(ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(13, 5, generator=generator), torch.randint(0, 5, (13,), generator=generator)
    correct = int((logits.argmax(1) == labels).sum())
    for found in fork_ranks(score_in_parts, 1, ranks):
        assert (found["samples"], found["correct"]) == (13, correct)
        assert found["accuracy"] == pytest.approx(correct / 13)
        assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet", "vit_b_16"])
def test_any_torchvision_classifier_by_name(name: str) -> None:
    model = make_torchvision_model(name, 7, {}).train()
    assert model(torch.rand(2, 3, 224, 224)).shape == (2, 7)


def test_argument_that_a_torchvision_model_does_not_take_raises_error() -> None:
    with pytest.raises(UsageError, match=r"model.network_args: torchvision's resnet18 raised: .*dropouts"):
        make_torchvision_model("resnet18", 7, {"dropouts": 0.1})


def test_weights_without_internet_name_the_command_that_downloads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies of its first use
    with pytest.raises(UsageError, match=r"weights: 'DEFAULT' of resnet18 cannot be .*refused.*get_model\('resnet18'"):
        make_torchvision_model("resnet18", 1000, {"weights": "DEFAULT"})


def test_network_args_with_a_module_raises_error() -> None:
    with pytest.raises(UsageError, match=r"model.network_args is only for a torchvision model by name"):
        Classifier(network=nn.Linear(2, 2), network_args={"x": 1})


def test_channels_last_gives_the_same_logits() -> None:
    torch.manual_seed(0)
    plain = Classifier("resnet18", 3).eval()
    other = Classifier("resnet18", 3, channels_last=True).eval()
    other.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 64, 64)
    assert other.get_parameter("network.conv1.weight").is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(other(images), plain(images), rtol=1e-4, atol=1e-4)


def test_compile_trains_and_keeps_the_names_of_the_weights(launch: Launch) -> None:
    network = ["--model.network", "lockstep.models.MLP", "--trainer.max_steps", "10", "--trainer.max_epochs", "-1"]
    run = launch(*SMALL, *network, "--model.compile", "true", "--checkpoint.monitor", "null")
    assert run.status == 0
    assert run.result["global_step"] == 10
    plain = launch(*SMALL, *network, "--checkpoint.monitor", "null")
    weights = [r.weights for r in (run, plain)]
    assert weights[0].keys() == weights[1].keys()
    assert run.series("train/loss") == pytest.approx(plain.series("train/loss"), abs=1e-4)


def test_ema_from_lightning_gives_other_final_weights(launch: Launch) -> None:
    plain = launch(*SMALL)
    ema = launch(*SMALL, "--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9")
    assert (plain.status, ema.status) == (0, 0)
    assert plain.result["weights_sha256"] != ema.result["weights_sha256"]
    assert plain.series("train/loss") == ema.series("train/loss")


class Uneven(LightningModule):
    """A linear model whose gradient is the weight of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(7))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (nn.functional.one_hot(batch[0], 7) * self.weight).sum(1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def uneven_step(world: World) -> list[float]:
    """The weights after one step on a single batch of 7 samples."""
    init_process_group(world, torch.device("cpu"), timedelta(seconds=30))
    strategy = make_strategy(
        Namespace(strategy="ddp", ddp=DDPOptions(), distributed=DistributedOptions()),  # type: ignore[no-untyped-call]
        [torch.device("cpu")] * world.local_size,
        DataSharding(world, 1),
    )
    module = Uneven()
    trainer = Trainer(
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    replace_loops(trainer)
    trainer.fit(module, DataLoader(TensorDataset(torch.arange(7)), batch_size=8, shuffle=True))
    destroy_process_group()
    return module.weight.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_sample_of_an_uneven_batch_has_the_same_weight_in_the_gradient(ranks: int) -> None:
    for weights in fork_ranks(uneven_step, 1, ranks):
        assert weights == pytest.approx([-1 / 7] * 7, abs=1e-6)


class CountWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what makes the host wait for the device: reading a tensor's value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        ):
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchWaits(Callback):
    """Counts the waits of each step, from the end of one batch to the end of the next."""

    def __init__(self) -> None:
        self.per_step: dict[int, list[str]] = {}
        self.mode: CountWaits | None = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.per_step[trainer.global_step] = self.mode.waits
            with open(trainer.default_root_dir + "/waits.json", "w") as file:
                json.dump(self.per_step, file)
            self.mode = None
        if trainer.global_step < 19:
            self.mode = CountWaits()
            self.mode.__enter__()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_the_host_waits_for_the_device_at_logged_steps_only(launch: Launch, ranks: str) -> None:
    run = launch("--ranks", ranks, *SMALL, "--trainer.max_epochs", "1", f"--trainer.callbacks+={__name__}.WatchWaits")
    assert run.status == 0
    waits = {int(step): found for step, found in json.loads((run.folder / "waits.json").read_text()).items()}
    assert any(waits.values())
    assert len(waits) == 18
    assert {step for step, found in waits.items() if found} <= {5, 6, 10, 11, 15, 16}
