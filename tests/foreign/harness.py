"""Train a row with a plain Trainer, on one rank and on two, kill and resume it, and compare."""

import csv
import shlex
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from support.faults import fault
from support.runs import Launch, Outcome, resume_run
from torch import Tensor

from foreign.base import Row
from lockstep.core import World
from lockstep.monitoring.report import weights_sha256
from lockstep.trainer.config_parser import instantiate, parse_config

BASE = (
    *("--config", str(Path(__file__).with_name("base.yaml"))),
    *("--checkpoint.every_n_steps", "4", "--checkpoint.async_save", "false"),
)

RELATIVE, ABSOLUTE = 2e-5, 2e-6
"""Two ranks sum the gradients of their halves of a batch: another order of float32 sums, about 1e-7 a step."""

OURS = ("lockstep/row", "step", "epoch", "rate/", "optim/")
"""Columns of ``metrics.csv`` that lockstep adds."""


def arguments_of(row: Row) -> list[str]:
    """The arguments of a run of ``row``."""
    data = [] if row.data is None else ["--data", f"{row.data.__module__}.{row.data.__qualname__}"]
    return [*BASE, "--model", f"{row.model.__module__}.{row.model.__qualname__}", *data, *shlex.split(row.arguments)]


def check_row(row: Row, launch: Launch, folder: Path) -> None:
    """Check everything that ``row`` promises."""
    arguments = arguments_of(row)
    one = launch(*arguments)
    assert_finished(one)
    row.check(one)
    if not row.own_order:
        weights, plain = train_plainly(row, folder / "plain")
        assert_same_metrics(metrics(one, row), plain)
        assert_same_weights(one.weights, weights, "of a plain Trainer", exactly=True)
    two = launch("--ranks", "2", *arguments)
    assert_finished(two)
    row.check(two)
    if not row.per_rank and not row.logged_per_rank:
        assert_same_metrics(metrics(two, row), metrics(one, row))
    if not row.per_rank:
        assert_same_weights(two.weights, one.weights, "of one rank")
    killed = launch("--ranks", "2", *arguments, *fault(folder / "killed", "SIGKILL", step=row.kill_step, rank=1))
    assert killed.status != 0 and (folder / "killed").exists(), "the run ended before the kill"
    assert killed.newest.step > 0
    resumed = resume_run(launch, killed)
    assert_finished(resumed)
    row.check(resumed)
    assert rows(resumed, row) == rows(two, row)
    assert_same_weights(resumed.weights, two.weights, "of the undisturbed run", exactly=True)
    assert resumed.result["weights_sha256"] == two.result["weights_sha256"]
    for name in ("global_step", "epochs"):
        assert resumed.result[name] == two.result[name], name


def check_refusal(row: Row, launch: Launch, said: Callable[[], str]) -> None:
    """Check that ``row`` is refused; ``said`` returns what was printed."""
    run = launch("--ranks", "2", *arguments_of(row))
    message = said()
    if row.refused_late:
        assert run.status == 1 and row.refused_late in message
    else:
        assert run.status == 2 and row.refused in message and "Traceback" not in message
        assert not (run.folder / "metrics.csv").exists()


def assert_finished(run: Outcome) -> None:
    """Check that the run has finished, and that a published checkpoint has the weights that its result reports."""
    assert run.status == 0 and run.result["status"] == "finished"
    assert weights_sha256(sorted(run.weights.items()), World()) == run.result["weights_sha256"]


def assert_same_metrics(found: Mapping[str, list[float]], expected: Mapping[str, list[float]]) -> None:
    """Compare all values of all metrics, within rounding."""
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == pytest.approx(expected[name], rel=RELATIVE, abs=ABSOLUTE, nan_ok=True), name


def assert_same_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], whose: str, exactly: bool = False
) -> None:
    """Compare state dicts, bit for bit or within rounding."""
    assert weights.keys() == expected.keys()
    rtol, atol = (0.0, 0.0) if exactly else (RELATIVE, ABSOLUTE)
    for name, tensor in weights.items():
        what = f"{name} is not that {whose}: "
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol, equal_nan=True, msg=what.__add__)


def rows(run: Outcome, row: Row) -> list[dict[str, str]]:
    """Rows of ``metrics.csv`` without what is measured."""
    without = ("rate/", *row.measured)
    with (run.folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in line.items() if not name.startswith(without)} for line in csv.DictReader(file)]


def metrics(run: Outcome, row: Row) -> dict[str, list[float]]:
    """All values of each metric of the user's."""
    return series(run.folder / "metrics.csv", (*OURS, *row.measured))


def series(path: Path, without: tuple[str, ...]) -> dict[str, list[float]]:
    """All values of each column of a CSV file, except columns that begin with a prefix of ``without``."""
    found: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            for name, value in line.items():
                if value and not name.startswith(without):
                    found.setdefault(name, []).append(float(value))
    return found


def train_plainly(row: Row, folder: Path) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Train with Lightning's own Trainer in a fork; return the final weights and all values of each metric."""
    folder.mkdir()
    process = get_context("fork").Process(target=_train_plainly, args=(arguments_of(row), folder))
    process.start()
    process.join()
    assert process.exitcode == 0, "a plain Trainer cannot train this"
    weights = {
        name: value for name, value in torch.load(folder / "weights.pt", weights_only=False).items() if torch.is_tensor(value)
    }
    return weights, series(folder / "csv" / "metrics.csv", (*OURS, *row.measured))


def _train_plainly(arguments: list[str], folder: Path) -> None:
    parser, config = parse_config(arguments)
    config.trainer.precision = config.trainer.precision.replace("auto", "32-true")
    seed_everything(config.seed_everything, verbose=False)
    objects = instantiate(parser, config)
    own: dict[str, Any] = vars(objects.trainer)
    callbacks = own["callbacks"] or []
    own_logger = own["logger"] if isinstance(own["logger"], list) else [own["logger"]] if own["logger"] else []
    trainer = Trainer(
        **own
        | {
            "logger": [CSVLogger(folder, name="", version="csv", flush_logs_every_n_steps=1), *own_logger],
            "accelerator": "cpu",
            "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        },
        default_root_dir=folder,
    )
    trainer.fit(objects.model, datamodule=objects.get("data"))
    torch.save(objects.model.state_dict(), folder / "weights.pt")
