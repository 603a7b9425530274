"""The CPUs and threads of ranks."""

import os

import pytest
import torch

from lockstep.core import World
from lockstep.distributed import fork_ranks
from lockstep.distributed.cpus import divide, set_threads, share_cpus


def test_cpus_near_a_gpu_go_to_its_rank() -> None:
    low, high = set(range(8)), set(range(8, 16))
    assert divide(low | high, [high, high, low, low], 4) == [{8, 9, 10, 11}, {12, 13, 14, 15}, {0, 1, 2, 3}, {4, 5, 6, 7}]
    assert divide(low | high, [low, low, low, low], 4) == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}]
    assert divide(set(range(7)), [low] * 3, 3) == [{0, 1}, {2, 3}, {4, 5}]


def test_cpus_that_slurm_has_not_bound_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert share_cpus(2, {"SLURM_CPUS_ON_NODE": "8"}) is None and share_cpus(2, {}) is None
    assert share_cpus(2, {"SLURM_CPUS_ON_NODE": "16"}) == [set(range(8)), set(range(8, 16))]
    assert share_cpus(32, {"SLURM_CPUS_ON_NODE": "16"}) is None


def test_operations_use_one_thread_or_with_gpus_the_cpus_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)

    def threads(cpus: int, on_gpu: bool, ranks: int) -> tuple[int, str]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))

        def start(_: World) -> tuple[int, str]:
            set_threads(on_gpu, ranks)
            return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]

        return fork_ranks(start)[0]

    assert threads(16, False, 4) == (1, "1")
    assert threads(16, True, 4) == (4, "4")  # shares all CPUs with the other ranks
    assert threads(3, True, 4) == (3, "3")  # has its own
    assert threads(16, True, 32) == (1, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads(16, True, 4)[1] == "2"
