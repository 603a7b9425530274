"""Runs on shards: few files are opened, then weights as of a run on folders, also if killed and resumed in mid-epoch."""

import os
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from support.faults import fault
from support.runs import Launch, assert_same_run, resume_run, undisturbed_run
from support.shards import write_folders

from lockstep.data import ImageFolder, Shards
from lockstep.pack.command import main

USAGE = 2


def run_on(name: str, root: Path, ranks: int) -> tuple[str, ...]:
    return (
        *("--model", "lockstep.models.Classifier", "--model.network", "lockstep.models.MLP"),
        *("--model.network.shape", "[3, 8, 8]", "--model.network.num_classes", "2", "--model.num_classes", "2"),
        *("--data", f"lockstep.data.{name}", "--data.root", str(root), "--data.size", "8", "--data.batch_size", "4"),
        *("--data.num_workers", "0", "--run.test_after_fit", "false", "--ranks", str(ranks)),
        *("--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "2", "--checkpoint.every_n_steps", "2"),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and their shards in another."""
    root = tmp_path_factory.mktemp("data")
    write_folders(root / "folders", 20)
    assert main([str(root / "folders"), str(root / "shards"), "--shard-size", "6", "--workers", "0"]) == 0
    return root


@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_are_those_of_folders_also_after_a_kill(launch: Launch, tmp_path: Path, root: Path, ranks: int) -> None:
    undisturbed = undisturbed_run(launch, *run_on("ImageFolder", root / "folders", ranks))
    killed = launch(*run_on("Shards", root / "shards", ranks), *fault(tmp_path / "once", "SIGKILL", step=3, rank=1))
    assert killed.status == 1
    assert_same_run(resume_run(launch, killed), undisturbed)


def test_a_run_reads_the_same_shards_in_all_attempts(
    launch: Launch, tmp_path: Path, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    undisturbed = undisturbed_run(launch, *run_on("ImageFolder", root / "folders", 1))
    data = tmp_path / "data"
    for path in (root / "shards").rglob("*.tar"):  # without the index, as shards of others
        (data / path.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(path, data / path.parent.name / path.name)
    killed = launch(*run_on("Shards", data, 1), *fault(tmp_path / "once", "SIGKILL", step=3))
    assert killed.status != 0
    shard, moved = data / "train" / "000003.tar", tmp_path / "moved.tar"
    shard.rename(moved)
    assert resume_run(launch, killed).status == USAGE
    assert "train that the run began with are gone: 000003.tar; restore them, or start a new run" in capfd.readouterr().err
    os.link(data / "train" / "000000.tar", shard)
    assert resume_run(launch, killed).status == USAGE
    assert "train that the run began with have changed: 000003.tar" in capfd.readouterr().err
    shard.rename(data / "train" / "000004.tar")
    moved.rename(shard)
    assert_same_run(resume_run(launch, killed), undisturbed)
    assert f"000004.tar in {data}/train are newer than the run, which does not read them" in capfd.readouterr().err


def opened(data: ImageFolder, root: Path) -> int:
    """The number of files below ``root`` that a process opens in two epochs."""
    paths = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(f"{root}/"):
            paths.append(arguments[0])

    def child() -> None:
        sys.addaudithook(hook)  # for good, and so in a process of its own
        data.setup("fit")
        for _ in range(2):
            for _ in data.train_dataloader():
                pass
        os._exit(len(paths))

    process = get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_files_are_opened_once_each(root: Path) -> None:
    folders = opened(ImageFolder(root=root / "folders", size=8, batch_size=4, num_workers=0), root)
    shards = opened(Shards(root=root / "shards", size=8, batch_size=4, num_workers=0), root)
    assert folders >= 40
    assert shards == 4 + 2  # the shards of train, and two indices
