"""Sums of the bits of tensors: a cheap checksum, computed on the device, that shows where weights differ."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.core import RunError
from lockstep.distributed import StopConsensus

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sums(tensors: Iterable[Any]) -> Tensor:
    """The bits of each tensor, summed as integers: shape (tensors,), int64, on the CPU; 0 for what is not a tensor."""
    sums = [
        _bit_sum(tensor.detach()) if isinstance(tensor, Tensor) else torch.zeros((), dtype=torch.int64) for tensor in tensors
    ]
    device = next((value.device for value in sums if value.device.type != "cpu"), torch.device("cpu"))
    # One copy from the device for all of them.
    return torch.stack([value.to(device) for value in sums]).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def _bit_sum(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().reshape(-1)
    flat = flat.view(_INTEGERS[min(8, flat.element_size())])
    per_word = 8 // flat.element_size()
    whole = flat.numel() // per_word * per_word
    if flat.storage_offset() % per_word:  # int64 must be aligned
        return flat.sum(dtype=torch.int64)
    return flat[:whole].view(torch.int64).sum() + flat[whole:].sum(dtype=torch.int64)


def check_ranks_agree(weights: Mapping[str, Tensor], consensus: StopConsensus, step: int, saved_step: int) -> None:
    """Raise RunError on all ranks if ``weights``, which are replicated, are not equal on all of them.

    It names ``step``, the ranks that differ from rank zero, and their first parameter; at ``saved_step`` all were equal.
    """
    names = sorted(weights)  # the modules of the ranks may have another order, as after pruning
    sums = bit_sums(weights[name] for name in names)
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
        "were equal. Some code has changed weights or gradients on one rank alone; let it do the same on all ranks. This step "
        "is not saved."
    )
