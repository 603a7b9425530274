"""Everything that only a GPU can show, on one GPU, within nine minutes and without a network:

    PYTHONPATH=src:tests:benchmarks python -m gpu.suite [--rows ROW …] [--minutes 9] [--out build/gpu.md]

``make gpu`` does so. Without a GPU it lists the rows. With LOCKSTEP_GPU_SUITE_DEVICE=cpu the rows run on the CPU with small
sizes, which rehearses the suite itself.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path

from gpu.harness import Line, Place, Row, Suite

REPO = Path(__file__).parents[2]


def run_function(place: Place, name: str) -> Iterable[Line]:
    """Call the row function ``module.function``; importing it takes seconds, so that only a row that runs does."""
    module, _, function = name.partition(".")
    lines: Iterable[Line] = getattr(import_module(f"gpu.{module}"), function)(place)
    return lines


def _row(name: str, title: str, seconds: int, function: str) -> Row:
    return Row(name, title, seconds, lambda place: run_function(place, function))


ROWS = (
    _row("precision", "train in each precision, channels-last, fused AdamW, pinned memory", 60, "training.precisions"),
    _row("nccl", "NCCL with one rank, and gloo beside it", 40, "training.process_group"),
    _row("resume", "bit-equal resume after SIGKILL", 90, "training.resuming"),
    _row("feed", "batches from workers, pinned memory and side stream", 40, "training.feeding"),
    _row("share", "two ranks that share the GPU over gloo, and a kill of one", 75, "training.sharing"),
    _row("zero", "ZeRO 1 to 3, offload, and resume", 100, "training.zero"),
    _row("steps", "ResNet-50 and ViT-B/16 against hand-written loops", 120, "speed.steps"),
    _row("plan", "lockstep plan against max_memory_allocated", 60, "speed.plan"),
    _row("images", "images from files and shards, decoded on CPUs and by the GPU", 80, "speed.images"),
    _row("hang", "the watchdog and a rank that is stopped", 45, "training.hang"),
    _row("timeout", "NCCL's time-out and the flight recorder", 60, "training.timed_out"),
    _row("compile", "torch.compile and a restart", 75, "training.compiled"),
    _row("compiled-steps", "the same networks compiled", 120, "speed.compiled_steps"),
)
"""In this order: what time is too short for is at the end. The limits allow for more than nine minutes, the rows do not."""


def has_gpu() -> bool:
    """Whether there is a GPU that this process may use; without torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")


def describe(device: str) -> str:
    """The machine and the versions, for the top of the table; CUDA is not initialized."""
    libraries = ("torch", "torchvision", "lightning", "deepspeed", "triton")
    versions = []
    for library in libraries:
        try:
            versions.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {library}")
    where = "Rehearsal on the CPU with small sizes: no number here is of a GPU"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, timeout=20)
            where = " and ".join(said.stdout.split("\n")[:-1]) or "a GPU that nvidia-smi does not name"
        except (OSError, subprocess.TimeoutExpired):
            where = "a GPU, without nvidia-smi"
    tools = ", ".join(f"{'' if shutil.which(tool) else 'no '}{tool}" for tool in ("nvcc", "g++", "ninja"))
    return f"{where}. Python {platform.python_version()}, {', '.join(versions)}; {os.cpu_count()} CPUs; {tools}."


def prepare(folder: Path) -> None:
    """Make the folder of the rows empty, and import what they fork from."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ |= {
        "WANDB_MODE": "disabled",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTHONWARNINGS": "ignore",
    }
    for module in ("gpu.training", "gpu.speed", "lockstep.trainer", "lockstep.trainer.local", "lockstep.data", "wandb", "step"):
        import_module(module)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows, or list them without a GPU; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="some rows only")
    parser.add_argument("--minutes", type=float, default=8.8, help="time for all rows and the imports")
    parser.add_argument("--out", type=Path, default=REPO / "build" / "gpu.md", help="the table")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if not options.rows or row.name in options.rows]
    device = os.environ.get("LOCKSTEP_GPU_SUITE_DEVICE", "cuda")
    if device == "cuda" and not has_gpu():
        print(f"There is no GPU here. With one, this would run, within {options.minutes:g} minutes, and write {options.out}:\n")
        for row in rows:
            print(f"  {row.name:15} at most {row.seconds:3} s  {row.title}")
        return 0
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        rows = [replace(row, seconds=4 * row.seconds) for row in rows]
    out = options.out.resolve()
    folder = out.parent / "gpu"
    prepare(folder)
    suite = Suite(rows, folder, out, device, 60 * options.minutes - 20, describe(device))
    status = suite.run()
    print(f"\n{out}")
    return status


if __name__ == "__main__":
    from gpu import suite  # forked rows unpickle the lines of this package, not of ``__main__``

    sys.exit(suite.main())
