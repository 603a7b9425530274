"""Shards of ZeRO without a training: which files a reader opens, and what it finds in them."""

from pathlib import Path

import pytest
import torch

from lockstep.core.errors import UsageError
from lockstep.strategies.sharded_state import INDEX_FILE, WEIGHT, ShardedState, join_places, shard_file

SHAPES = {"first": [10, 5], "empty": [0], "second": [7], "elsewhere": [3]}


def save(folder: Path, ranks: int) -> dict[str, torch.Tensor]:
    """Save two weights, of which each rank has an equal part with padding as in stage 3; return them."""
    weights = {name: torch.arange(float(torch.Size(shape).numel())) for name, shape in SHAPES.items()}
    by_rank = []
    for rank in range(ranks):
        parts: list[torch.Tensor] = []
        places = []
        for number, name in enumerate(("first", "empty", "second")):
            size = -(-len(weights[name]) // ranks)
            part = weights[name][rank * size : (rank + 1) * size]
            places.append([number, min(rank * size, len(weights[name])), len(part), 0, sum(len(part) for part in parts)])
            parts.append(torch.nn.functional.pad(part, (0, size - len(part)), value=-1.0))
        torch.save([{WEIGHT: torch.cat(parts), "momentum": torch.cat(parts) * 2}], folder / shard_file(rank))
        by_rank.append(torch.tensor(places).T)
    torch.save({"slices": join_places(by_rank, SHAPES), "keys": ["momentum"]}, folder / INDEX_FILE)
    return weights


@pytest.mark.parametrize("ranks", [1, 3, 4, 64])
def test_any_elements_are_found(tmp_path: Path, ranks: int) -> None:
    weights = save(tmp_path, ranks)
    saved = ShardedState.from_shards(tmp_path)
    assert saved is not None and list(saved.slices) == ["first", "empty", "second"]
    for start in range(50):
        for size in (0, 1, 13, 50 - start):
            if start + size <= 50:
                assert torch.equal(saved.slice("first", "momentum", start, size), 2 * weights["first"][start : start + size])
    assert torch.equal(saved.full_tensor("first"), weights["first"].reshape(10, 5))
    assert saved.full_tensor("empty").shape == (0,)
    assert torch.equal(saved.slice("second", "unknown", 2, 4), torch.zeros(4))
    with pytest.raises(UsageError, match="it lacks 2 of 5 elements of second"):
        saved.slice("second", WEIGHT, 4, 5)


def test_a_rank_opens_only_the_shards_that_it_needs(tmp_path: Path) -> None:
    weights = save(tmp_path, 10)
    for rank in range(10):
        if rank not in (4, 5):
            (tmp_path / shard_file(rank)).unlink()
    saved = ShardedState.from_shards(tmp_path)
    assert saved is not None
    assert torch.equal(saved.slice("first", WEIGHT, 20, 10), weights["first"][20:30])
    with pytest.raises(FileNotFoundError, match=r"shard-3\.pt"):
        saved.slice("first", WEIGHT, 19, 2)
