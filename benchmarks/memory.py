"""Memory of ranks that train with DDP and each stage of ZeRO, over gloo on CPUs, compared with the estimates of --plan.

    python benchmarks/memory.py [--precision 32-true] [--strategies ddp zero1 zero2 zero3] [--ranks 1 2 4]

After each backward pass of the third step (of two batches), a rank counts the bytes of its weights, its gradients and its
optimizer's state, each storage once. The table gives the largest rank, in MB, and its ratio to the estimate.
"""

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lockstep.cli import local
from lockstep.planning.memory import MemoryEstimate, ModelProfile, TrainingOptions, estimate_memory
from lockstep.planning.model_profile import profile_model
from lockstep.trainer.config_parser import parse_config

REPO = Path(__file__).resolve().parents[1]
RUN = (
    f"--config={REPO}/configs/digits.yaml",
    "--trainer.max_epochs=-1",
    "--trainer.max_steps=4",
    "--trainer.accumulate_grad_batches=2",
    "--run.test_after_fit=false",
    "--model.network=lockstep.models.MLP",
    "--model.network.hidden=[512,512,512,512,512,512,512,512,512,512]",
    "--model.schedule=constant",
    "--wandb.mode=disabled",
    "--trainer.precision",  # the caller adds the value
)
"""Arguments of the run that is measured."""

STRATEGIES = {
    "ddp": ["--strategy=ddp"],
    **{f"zero{stage}": ["--strategy=deepspeed", f"--deepspeed.stage={stage}"] for stage in (1, 2, 3)},
}


class MemoryRecorder(Callback):
    """Write the bytes that each rank holds to a file.

    Args:
        folder: Folder for one JSON file per rank.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.peak: dict[str, int] = {}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 2:
            is_zero = isinstance(trainer.strategy, DeepSpeedStrategy)
            held = zero_memory(trainer) if is_zero else ddp_memory(pl_module, trainer.optimizers[0])
            self.peak = {name: max(size, self.peak.get(name, 0)) for name, size in held.items()}
            (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(self.peak))


def ddp_memory(module: LightningModule, optimizer: Any) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state of a rank that holds all of them."""
    parameters = list(module.parameters())
    return {
        "weights": count_bytes([*parameters, *module.buffers()]),
        "gradients": count_bytes(parameter.grad for parameter in parameters),
        "optimizer": count_bytes(state_tensors(optimizer)),
    }


def zero_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes of a rank's shards with DeepSpeed; float32 master weights count as the optimizer's."""
    strategy: Any = trainer.strategy
    engine = strategy.deepspeed_engine
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    shards = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    weights = [*parameters, *shards, *engine.module.buffers()]
    if shards:  # stage 3
        gradients = [zero.grad_partitions_flat_buffer, *(parameter.grad for parameter in parameters)]
        master_weights = zero.fp32_partitioned_groups_flat
    else:
        gradients = [parameter.grad for parameter in parameters]
        gradients += [gradient for group in zero.averaged_gradients.values() for gradient in group or ()]
        master_weights = zero.single_partition_of_fp32_groups
    return {
        "weights": count_bytes(weights),
        "gradients": count_bytes(gradients),
        "optimizer": count_bytes([*state_tensors(zero.optimizer), *master_weights], without=weights),
    }


def state_tensors(optimizer: Any) -> Iterator[Tensor]:
    """All tensors in the state of an optimizer."""
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def count_bytes(tensors: Iterable[Tensor | None], without: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages of ``tensors``, each once, without the storages of other tensors."""
    others = {tensor.untyped_storage().data_ptr() for tensor in without}
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in others)


def run_locally(arguments: Sequence[str]) -> None:
    """Run ``launch/local.py`` in this process, and exit."""
    sys.exit(local.main(arguments))


def measure(strategy: str, ranks: int, precision: str) -> list[dict[str, int]]:
    """Train, and return the bytes that each rank held."""
    with tempfile.TemporaryDirectory() as folder:
        record = ["--trainer.callbacks+=memory.MemoryRecorder", f"--trainer.callbacks.folder={folder}"]
        keys = [*RUN, precision, *STRATEGIES[strategy], *record, f"--run.root={folder}/runs"]
        # A process that has run backward cannot fork ranks, so each run has its own.
        run = multiprocessing.get_context("fork").Process(target=run_locally, args=([f"--ranks={ranks}", *keys],))
        run.start()
        run.join()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def estimate(model: ModelProfile, precision: str, strategy: str, ranks: int) -> MemoryEstimate:
    """What --plan says that each rank of the run holds."""
    return estimate_memory(strategy, model, ranks, 64 // ranks, TrainingOptions(precision, accumulate_grad_batches=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="32-true", help="as in Lightning's Trainer")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quantities = ("weights", "gradients", "optimizer")
    table = Table("strategy", "ranks", *(f"{name}, MB (of estimate)" for name in quantities), box=None)
    cases = [(strategy, ranks) for strategy in options.strategies for ranks in options.ranks]
    measured = [measure(strategy, ranks, options.precision) for strategy, ranks in cases]
    model = profile_model(parse_config([*RUN, options.precision])[1], options.precision)
    for (strategy, ranks), by_rank in zip(cases, measured, strict=True):
        expected = estimate(model, options.precision, strategy, ranks)
        largest = {name: max(held[name] for held in by_rank) for name in quantities}
        cells = [f"{size / 1e6:.2f} ({size / getattr(expected, name):.2f})" for name, size in largest.items()]
        table.add_row(strategy, str(ranks), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
