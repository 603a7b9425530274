"""Bytes that ranks hold while they train, with DDP and each stage of ZeRO, over gloo on CPUs, and what --plan says.

    python benchmarks/memory.py

After each backward pass of the third step (two batches make a step) a rank counts the memory behind its weights, its gradients
and its optimizer, each piece of memory once, whoever holds it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lockstep.config.schema import DDPOptions, DeepSpeedOptions
from lockstep.planning.fake_step import profile_model
from lockstep.planning.memory import MemoryEstimate, ModelProfile, estimate_memory
from lockstep.trainer.config_parser import parse_config

REPO = Path(__file__).resolve().parents[1]
RUN = (
    *(
        "--config",
        str(REPO / "configs/digits.yaml"),
        "--trainer.max_epochs=-1",
        "--trainer.max_steps=4",
        "--run.test_after_fit=false",
    ),
    *(
        "--model.network=lockstep.models.MLP",
        "--model.network.hidden=[512,512,512,512,512,512,512,512,512,512]",
        "--model.schedule=constant",
    ),
    *("--wandb.mode=disabled", "--trainer.accumulate_grad_batches=2", "--trainer.precision"),
)
WAYS = {"ddp": ["--strategy=ddp"], **{f"zero{n}": ["--strategy=deepspeed", f"--deepspeed.stage={n}"] for n in (1, 2, 3)}}


class Held(Callback):
    """Writes down what each rank holds.

    Args:
        folder: Gets a file of each rank.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.most: dict[str, int] = {}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 2:
            zero = isinstance(trainer.strategy, DeepSpeedStrategy)
            held = held_with_zero(trainer) if zero else held_with_ddp(pl_module, trainer.optimizers[0])
            self.most = {name: max(size, self.most.get(name, 0)) for name, size in held.items()}
            (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(self.most))


def held_with_ddp(module: LightningModule, optimizer: Any) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer where each rank has all."""
    parameters = list(module.parameters())
    return {
        "weights": memory([*parameters, *module.buffers()]),
        "gradients": memory(p.grad for p in parameters),
        "optimizer": memory(kept(optimizer)),
    }


def held_with_zero(trainer: Trainer) -> dict[str, int]:
    """The same where DeepSpeed shares them out; its master weights are the optimizer's."""
    engine: Any = trainer.strategy.deepspeed_engine
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    parts = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    weights = [*parameters, *parts, *engine.module.buffers()]
    if parts:
        gradients = [zero.grad_partitions_flat_buffer, *(p.grad for p in parameters)]
        masters = zero.fp32_partitioned_groups_flat
    else:
        gradients = [p.grad for p in parameters]
        gradients += [piece for pieces in zero.averaged_gradients.values() for piece in pieces or ()]
        masters = zero.single_partition_of_fp32_groups
    return {
        "weights": memory(weights),
        "gradients": memory(gradients),
        "optimizer": memory([*kept(zero.optimizer), *masters], but=weights),
    }


def kept(optimizer: Any) -> Iterator[Tensor]:
    """All tensors that an optimizer keeps."""
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def memory(tensors: Iterable[Tensor | None], but: Iterable[Tensor] = ()) -> int:
    """Bytes behind ``tensors``, each piece once, without those behind others."""
    others = {tensor.untyped_storage().data_ptr() for tensor in but}
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(size for address, size in pieces.items() if address not in others)


def measured(ways: list[str], ranks: int, precision: str) -> list[dict[str, int]]:
    """What each rank of a run holds."""
    with tempfile.TemporaryDirectory() as folder:
        watch = ["--trainer.callbacks+=memory.Held", f"--trainer.callbacks.folder={folder}", f"--run.root={folder}/runs"]
        command = [sys.executable, str(REPO / "launch/local.py"), f"--ranks={ranks}", *RUN, precision, *ways, *watch]
        path = os.pathsep.join([str(REPO / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True, cwd=folder)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def planner(model: ModelProfile, precision: str) -> Callable[[str, int], MemoryEstimate]:
    """Knows what --plan says that a rank of the same run holds, for each way and number of ranks."""
    ddp, zero = DDPOptions(), DeepSpeedOptions()
    return lambda way, ranks: estimate_memory(way, model, ranks, 64 // ranks, precision, ddp, zero, accumulate=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="32-true", help="as in lightning's Trainer")
    precision = parser.parse_args().precision
    planned = planner(profile_model(parse_config([*RUN, precision])[1], precision), precision)
    table = Table("strategy", "ranks", *(f"{name}, MB (of plan)" for name in ("weights", "gradients", "optimizer")), box=None)
    for way, arguments in WAYS.items():
        for ranks in (1, 2, 4):
            held = measured(arguments, ranks, precision)
            most = {name: max(of_rank[name] for of_rank in held) for name in held[0]}
            plan = planned(way, ranks)
            cells = [f"{most[name] / 1e6:.2f} ({most[name] / getattr(plan, name):.2f})" for name in most]
            table.add_row(way, str(ranks), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
