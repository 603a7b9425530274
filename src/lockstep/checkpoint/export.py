"""Export the weights of a run to one safetensors file: ``lockstep export RUN --out FILE``.

Names and shapes are those of the LightningModule's ``state_dict``. With ``--part network`` they are those of its attribute
``network``, ready to load into the bare network. Floating-point tensors are float32; where ZeRO trained in half precision,
they are the float32 weights that its optimizer stepped.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from lockstep.checkpoint.reader import Checkpoint, find_checkpoint
from lockstep.checkpoint.serialization import load_weights
from lockstep.config import check_export_format
from lockstep.core import CommandLineParser, LockstepError, UsageError, World, atomic_write, setup_logging
from lockstep.runs import Run, RunResult, describe_run
from lockstep.slurm import NodeTask
from lockstep.strategies import ShardedState

log = logging.getLogger(__name__)


def export_weights(place: Path, out: Path, part: str | None = None) -> int:
    """Write the weights and buffers at ``place`` to ``out`` in the safetensors format; return the number of their elements."""
    check_export_format(out)
    if not out.parent.is_dir():
        raise UsageError(f"--out: {out.parent} is not a folder here; make it first.")
    found = find_checkpoint(place, "RUN")
    model = found.model if isinstance(found, Checkpoint) else found
    try:
        weights = load_weights(model)
    except Exception as error:  # the user may have named any file
        raise UsageError(f"{model} is not a checkpoint of Lightning ({type(error).__name__}).") from None
    if (sharded := ShardedState.from_shards(model.parent)) is not None:
        weights |= sharded.full_weights()
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    if part is not None:
        parts = sorted({name.partition(".")[0] for name in weights})
        weights = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
        if not weights:
            raise UsageError(f"--part: the module has no {part!r}; it has {', '.join(parts)}.")
    seen: set[int] = set()
    for name, value in weights.items():  # safetensors refuses tensors that share memory, such as tied weights
        weights[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value.contiguous()
        seen.add(value.untyped_storage().data_ptr())
    try:
        atomic_write(out, lambda temporary: save_file(weights, temporary))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--out: {out} cannot be written ({error}).") from None
    return sum(value.numel() for value in weights.values())


class ExportNode:
    """The agent of a job that exports, see ``NodeTask``; a relative ``--out`` is in the folder of the exported run."""

    def __init__(self, task: NodeTask, agents: World, run: Run, attempt: int, notes: list[str]) -> None:
        self.options = make_parser().parse_args(task.arguments)
        self.run_folder, self.attempt, self.notes = run, attempt, notes

    def run(self) -> int:
        """Export, write ``result.json``, and return the exit status."""
        run, out = self.run_folder, self.options.run / self.options.out
        setup_logging(World(), run.log(self.attempt))
        for note in self.notes:
            log.info(note)
        out.parent.mkdir(parents=True, exist_ok=True)
        log.info("%s: %s numbers", out, f"{export_weights(self.options.run, out, self.options.part):,}")
        result = RunResult("finished", "export", 1, self.attempt, weights=str(out))
        describe_run(run, result).write(run.result)
        return 0


def main(arguments: Sequence[str]) -> int:
    """Run ``lockstep export`` and return its exit status."""
    parser = make_parser()
    try:
        options = parser.parse_args(arguments)
        print(f"{options.out}: {export_weights(options.run, options.out, options.part):,} numbers")
        return 0
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status


def make_parser() -> CommandLineParser:
    """Build the parser of ``lockstep export``."""
    parser = CommandLineParser(
        prog="lockstep export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder (its newest checkpoint), or a checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, such as weights.safetensors")
    parser.add_argument("--part", metavar="NAME", help="only this submodule, such as network")
    return parser
