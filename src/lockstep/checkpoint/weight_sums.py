"""Checksums of tensors, computed on their device, that show where weights differ."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lockstep.core import RunError
from lockstep.distributed import StopConsensus

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""2**64 divided by the golden ratio: the bits of its multiples are spread over a word."""


def weight_sums(tensors: Iterable[Any]) -> Tensor:
    """Checksums of the bits of tensors and their order: shape (tensors,), int64, on the CPU; 0 for other objects."""
    nothing = torch.zeros((), dtype=torch.int64)
    sums = [_weight_sum(tensor.detach()) if isinstance(tensor, Tensor) else nothing for tensor in tensors]
    device = next((value.device for value in sums if value.device.type != "cpu"), torch.device("cpu"))
    # One copy from the device for all of them.
    return torch.stack([value.to(device) for value in sums]).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def _weight_sum(tensor: Tensor) -> Tensor:
    """Checksum of a tensor, shape (), in two passes without a copy of it: its words are laid out as a square.

    The sum of each row and of each column, modulo 2**64, gets its own factor, so that swapped words change the checksum.
    """
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:  # words must be aligned
        flat = flat.clone()
    count = flat.numel() // 8
    words, rest = flat[: count * 8].view(torch.int64), pad(flat[count * 8 :], (0, -flat.numel() % 8)).view(torch.int64)
    side = math.isqrt(count)
    square, more = words[: side * side].view(side, side), words[side * side :]
    sums = torch.cat([square.sum(0), square.sum(1), more, rest])
    sums ^= sums >> 32  # round numbers differ in the highest bits only, which a factor would shift out
    return (sums * (torch.arange(1, len(sums) + 1, device=flat.device) * _GOLDEN | 1)).sum()


def check_ranks_agree(weights: Mapping[str, Tensor], consensus: StopConsensus, step: int, saved_step: int) -> None:
    """Raise RunError on all ranks if ``weights``, which are replicated, are not equal on all of them.

    It names ``step``, the ranks that differ from rank zero, and their first parameter; at ``saved_step`` all were equal.
    """
    names = sorted(weights)  # the modules of the ranks may have another order, as after pruning
    sums = weight_sums(weights[name] for name in names)
    if consensus.is_equal(sums):
        return
    by_rank: Sequence[Tensor] = consensus.all_gather(sums)
    differing = {rank: (by_rank[0] != own).nonzero().flatten().tolist() for rank, own in enumerate(by_rank)}
    ranks = [rank for rank, places in differing.items() if places]
    places = differing[ranks[0]]
    more = f" and {len(places) - 1} more parameters" if len(places) > 1 else ""
    raise RunError(
        f"After step {step} the ranks have different weights: {names[places[0]]}{more} of rank "
        f"{', '.join(map(str, ranks[:8]))}{' …' if len(ranks) > 8 else ''} differ from rank 0; after step {saved_step} they "
        "were equal. Some code has changed weights or gradients on one rank only; it must do the same on all ranks. This step "
        "is not saved."
    )
