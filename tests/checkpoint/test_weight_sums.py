"""Checksums of weights: every change and every change of places shows, and no other; tensors alone."""

import pytest
import torch
from torch import Tensor

from lockstep.checkpoint.weight_sums import weight_sums


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    """Round numbers, whose bits are alike."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 7, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(3,), (40, 51), (64, 1024)])
def test_numbers_that_change_or_change_places_show(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weights = draw(dtype, *shape)
    flat = weights.reshape(-1)
    sums = {int(weight_sums([weights]))}
    others = [weights.flip(0), weights.roll(1, 0), flat.sort(stable=True).values if dtype != torch.complex64 else flat.flip(0)]
    for at in (0, len(flat) // 2, len(flat) - 1):
        other = flat.clone()
        other[at] = ~other[at] if dtype == torch.bool else other[at] + 1
        others.append(other)
        if len(different := (flat != flat[at]).nonzero().flatten()):
            swapped = flat.clone()
            swapped[[at, int(different[-1])]] = flat[[int(different[-1]), at]]
            others.append(swapped)
    unlike = [other for other in others if not torch.equal(other.reshape(-1), flat)]
    assert len(unlike) >= 3
    for number, other in enumerate(unlike):
        assert int(weight_sums([other])) not in sums, number


def test_places_in_memory_do_not_show() -> None:
    weights = draw(torch.float32, 6, 5, 4, 3)
    in_buffer = torch.zeros(weights.numel() + 1)[1:].copy_(weights.reshape(-1)).view_as(weights)
    alike = [weights, weights.to(memory_format=torch.channels_last), in_buffer, torch.nn.Parameter(weights)]
    assert len(set(weight_sums(alike).tolist())) == 1
    assert weight_sums([]).shape == (0,)
    assert weight_sums(["no tensor", torch.zeros(0), torch.zeros(())]).tolist() == [0, 0, 0]
