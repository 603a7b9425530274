"""One plain file of a run's weights, for anything that reads safetensors: ``lockstep export RUN --out FILE``.

Names and shapes are those of the LightningModule's ``state_dict``; with ``--part network`` those of that part of it alone,
ready for the bare network. Floating-point tensors are float32: where ZeRO trains in half precision, the weights that it steps.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lockstep.checkpoint.reader import Checkpoint, find_checkpoint
from lockstep.checkpoint.sharded_state import ShardedState
from lockstep.core import CommandLineParser, LockstepError, UsageError


def load_weights(checkpoint: Checkpoint | Path) -> dict[str, Tensor]:
    """All weights and buffers in a checkpoint, by name, on the CPU; floating-point ones in float32.

    Raises:
        UsageError: It is no checkpoint.
    """
    model = checkpoint.model if isinstance(checkpoint, Checkpoint) else checkpoint
    try:
        whole: dict[str, Tensor] = torch.load(model, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except Exception as error:  # whatever file was named
        raise UsageError(f"{model} is no checkpoint of lightning's ({type(error).__name__}).") from None
    if (saved := ShardedState.of(model.parent)) is not None:
        whole |= saved.weights()
    return {name: value.float() if value.is_floating_point() else value for name, value in whole.items()}


def export_weights(place: Path, out: Path, part: str | None = None) -> int:
    """Write the weights of a run, or of a checkpoint, to ``out``, and return their number.

    Args:
        place: A run folder (its newest whole checkpoint), or a checkpoint.
        out: File to write, in the safetensors format.
        part: Only what is below this name, without the name.

    Raises:
        UsageError: There is no such checkpoint or part, or ``out`` cannot be written.
    """
    whole = load_weights(find_checkpoint(place, "RUN"))
    if part is not None:
        names = sorted({name.partition(".")[0] for name in whole})
        whole = {name.removeprefix(f"{part}."): value for name, value in whole.items() if name.startswith(f"{part}.")}
        if not whole:
            raise UsageError(f"--part: the module has no {part!r}; it has {', '.join(names)}.")
    seen: set[int] = set()
    for name, value in whole.items():  # safetensors refuses tensors that share memory, such as tied weights
        whole[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value.contiguous()
        seen.add(value.untyped_storage().data_ptr())
    beside = out.with_name(f".{out.name}")
    try:
        save_file(whole, beside)
        beside.replace(out)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"--out: {out} cannot be written ({error}).") from None
    return sum(value.numel() for value in whole.values())


def main(arguments: Sequence[str]) -> int:
    """Export as ``arguments`` say, and return the exit status."""
    parser = CommandLineParser(
        prog="lockstep export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder (its newest checkpoint), or a checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, such as weights.safetensors")
    parser.add_argument("--part", metavar="NAME", help="only this part of the module, such as network")
    try:
        given = parser.parse_args(arguments)
        count = export_weights(given.run, given.out, given.part)
        print(f"{given.out}: {count:,} numbers")
        return 0
    except LockstepError as error:
        print(f"lockstep: {error.message}", file=sys.stderr)
        return error.exit_status
