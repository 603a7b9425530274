"""The rows of all ranks are merged into one safetensors file in the order of the samples, with constant memory."""

import os
import resource
import tracemalloc
from pathlib import Path

import torch
from safetensors.torch import load_file

from lockstep.trainer.prediction_parts import Part, PartWriter, merge_parts

SAMPLES = 12_000


def test_rows_of_all_types_are_merged_in_order_without_holding_them(tmp_path: Path) -> None:
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    expected = {
        "wide": torch.arange(SAMPLES * 1000, dtype=torch.float32).reshape(SAMPLES, 10, 100),
        "label": torch.arange(SAMPLES),
        "half": torch.arange(SAMPLES, dtype=torch.float32).to(torch.bfloat16)[:, None],
        "flag": torch.arange(SAMPLES) % 3 == 0,
        "nothing": torch.zeros(SAMPLES, 0),
    }
    for rank, indices in enumerate((order[:5000], order[5000:])):
        writer = PartWriter(tmp_path / "parts", rank)
        for batch in torch.split(indices, 64):
            writer.append(batch.tolist(), {name: tensor[batch] for name, tensor in expected.items()})
        writer.close()
    tracemalloc.start()
    parts = [Part.open(tmp_path / "parts", rank) for rank in range(2)]
    assert merge_parts(parts, tmp_path / "merged.safetensors") == SAMPLES
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype and torch.equal(merged[name], tensor), name
    assert peak < 2e7 < expected["wide"].nbytes / 2


def test_more_ranks_are_merged_than_a_process_may_have_files(tmp_path: Path) -> None:
    for rank in range(100):
        writer = PartWriter(tmp_path / "parts", rank)
        writer.append([rank, 199 - rank], {"x": torch.tensor([rank, 199 - rank]), "y": torch.zeros(2, 3)})
        writer.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert merge_parts([Part.open(tmp_path / "parts", rank) for rank in range(100)], tmp_path / "merged") == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert load_file(tmp_path / "merged")["x"].tolist() == list(range(200))


def test_discarded_parts_leave_no_folder(tmp_path: Path) -> None:
    writers = [PartWriter(tmp_path / "parts", rank) for rank in range(3)]
    for writer in writers[:2]:
        writer.append([0], {"x": torch.zeros(1, 2)})
    writers[0].close()
    for writer in writers:
        writer.discard()
    assert list(tmp_path.iterdir()) == []
