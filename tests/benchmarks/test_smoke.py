"""Every benchmark runs with its smallest arguments and prints its table.

Cheapest first: trainings in forks of this process, then an agent, which imports torch, and a fault on a Slurm cluster. The
benchmark of submissions is tested in ``tests/slurm/test_submit.py``.
"""

import multiprocessing
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import agent
import checkpoint
import faults
import growth
import growth_checkpoint
import input as input_pipeline
import memory
import pytest
import step
import step_setup
import streams

pytestmark = pytest.mark.timeout(150)

NUMBER = r"[\d.,]+"


def run_in_fork(main: Callable[[Sequence[str]], int | None], *arguments: str) -> None:
    """Run the ``main`` of a benchmark, which must succeed; this process must stay able to fork ranks."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(arguments)))
    process.start()
    process.join()
    assert process.exitcode == 0


def assert_row(output: str, *cells: str) -> None:
    """Check that a line of ``output`` has these cells, which are regular expressions."""
    pattern = r"[\s│]+".join(cells)
    assert re.search(pattern, output), f"{pattern} is missing in\n{output}"


def test_checkpoint(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_fork(checkpoint.main, "--rounds", "1", "--megabytes", "1")
    output = capfd.readouterr().out
    for name in checkpoint.SAVES:
        assert_row(output, "1 MB", re.escape(name), f"{NUMBER} ms", NUMBER)


def test_growth_of_checkpoints(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_fork(growth_checkpoint.main, "--largest", "100000")
    output = capfd.readouterr().out
    for ranks in (1, 8, 64):
        assert re.search(
            rf"\| checkpoint: verify a share, busiest rank \| {ranks} ranks, 0 MB each \| {NUMBER} \| 0\.1 \|", output
        )
    assert re.search(rf"\| checkpoint: read one's own shard \| 512 ranks \| {NUMBER} \| {NUMBER} \|", output)


def test_growth(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_fork(growth.main, "--largest", "10000", "--groups", "index", "predict", "jobs", "snapshot", "metrics", "hang")
    run_in_fork(growth.main, "--largest", "1000000", "--groups", "order")
    run_in_fork(growth.main, "--largest", "1000", "--groups", "workers", "--workers", "1")
    output = capfd.readouterr().out
    for what in ("lockstep, image folder", "usual way, a list of names"):
        assert re.search(rf"\| {what} \| 1e\+03 files, 1 workers \| {NUMBER} \|( {NUMBER} \|){{5}}", output), output
    for what in (
        "order: first batch after a resume",
        "image index: open, on each rank",
        "predict: merge rows of 1 kB",
        "lockstep jobs list: all",
        "snapshot: verify, on each node",
        "resume metrics.csv: any other rank",
        "hang report: any other rank",
    ):
        assert re.search(rf"\| {what} \| [\w+, ]+ \| {NUMBER} \| {NUMBER} \|", output), output


def test_input(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = ("torchvision v2", "lockstep folders", "lockstep shards, 256, raw")
    run_in_fork(input_pipeline.main, "--images", "128", "--rounds", "1", "--root", str(tmp_path), "--rows", "litdata", *rows)
    output = capfd.readouterr().out
    for name in ("tutorial", *rows):
        assert re.search(rf"\| {name} \| {NUMBER} \| {NUMBER} \| {NUMBER} to {NUMBER} \|", output), output
    assert find_spec("litdata") or "litdata is not installed, and its rows are left out: uv pip install litdata" in output
    assert not list(tmp_path.iterdir())


def test_streams(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_fork(streams.main, "--samples", "100", "--positions", "2")
    rows = capfd.readouterr().out.splitlines()[2:]  # the libraries need not be here
    assert len(rows) >= len(streams.LIBRARIES)
    assert all(re.search(r"\| (not installed|(\d+) of \2) \|", row) for row in rows), rows


def test_memory(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_fork(memory.main, "--strategies", "ddp", "--ranks", "1")
    assert_row(capfd.readouterr().out, "ddp", "1", *[rf"{NUMBER} \({NUMBER}\)"] * 3)


def test_step(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_fork(step.main, "--rounds", "1", "--steps", str(step.WARM_UP + 1), "--networks", "tiny MLP")
    output = capfd.readouterr().out
    for name in step.TRAINERS:
        assert_row(output, "tiny MLP", re.escape(name), NUMBER, NUMBER, NUMBER)


def test_step_of_a_network_for_imagenet(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a smaller network, as the test has no GPU; the images are on the device all the same."""
    monkeypatch.setitem(step_setup.NETWORKS, "ResNet-50", ("shufflenet_v2_x0_5", {}))
    monkeypatch.setattr(step, "WARM_UP", 1)
    options = ("--batch-size", "2", "--precision", "bf16-mixed", "--channels-last", "--accelerator", "cpu", "--ranks", "1")
    names = list(step.TRAINERS)[:3]
    run_in_fork(step.main, "--rounds", "1", "--steps", "3", "--networks", "ResNet-50", *options, "--trainers", *names)
    output = capfd.readouterr().out
    for name in names:
        assert_row(output, "ResNet-50", re.escape(name), NUMBER, NUMBER, NUMBER)


def test_agent(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_fork(agent.main, "--ranks", "2", "--kills", "1")
    cells = capfd.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert cells[0] == "2" and float(cells[2]) > float(cells[3]) > 0 and float(cells[4]) > 0 and float(cells[5]) > 0


@pytest.mark.timeout(300)  # three times, ranks import torch
@pytest.mark.usefixtures("slurm_is_here")
def test_faults(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_fork(faults.main, "--rows", "1", "--nodes", "1", "--step-seconds", "0.02")
    assert_row(capfd.readouterr().out, "1", "SIGKILL of a rank", "2", NUMBER, NUMBER, "yes", "yes", "finished")
