"""The list of an image folder's files: its content, one walk for all processes, then runs whose files change."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.runs import Launch, resume_run

from lockstep.core.errors import RunError, StorageError
from lockstep.data import file_index
from lockstep.data.file_index import FileIndex, publish_index, scan
from lockstep.data.image_folder import ImageFolder

USAGE = 2


def write_files(folder: Path, names: dict[str, list[str]]) -> None:
    for label, files in names.items():
        for name in files:
            (folder / label / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 90).save(folder / label / name, format="PNG")


def age(root: Path) -> None:
    """Let the folders be older than a time stamp can hide a change."""
    for folder in (root, *root.rglob("*")):
        if folder.is_dir():
            os.utime(folder, (1e9, 1e9))


def test_an_index_keeps_order_labels_and_names_of_any_bytes(tmp_path: Path) -> None:
    odd = os.fsdecode(b"b\xff\n.png")
    write_files(tmp_path / "train", {"dog": ["z.png", odd, "more/é.PNG"], "cat": ["a.png"]})
    (tmp_path / "train" / "dog" / "notes.txt").touch()
    expected = [("cat/a.png", 0), *sorted((f"dog/{name}", 1) for name in ("z.png", odd, "more/é.PNG"))]
    path = tmp_path / "run" / "train.index"
    publish_index(scan(tmp_path / "train"), path, replace=True)
    for index in (FileIndex(scan(tmp_path / "train")), FileIndex.open(path)):
        for copy in (index, pickle.loads(pickle.dumps(index))):
            assert [copy[number] for number in range(len(copy))] == expected
            assert (copy[-1], copy.classes, copy.labels.tolist()) == (expected[-1], ["cat", "dog"], [0, 1, 1, 1])
            copy.verify()
    assert len(pickle.dumps(FileIndex.open(path))) < 300
    files = ImageFolder(root=tmp_path, size=8).load("train")
    assert files.samples == [(str(tmp_path / "train" / name), label) for name, label in expected]
    assert files.targets == [0, 1, 1, 1]


@pytest.mark.parametrize("change", ["", "shorter", "other bytes"])
def test_a_damaged_index_is_named(tmp_path: Path, change: str) -> None:
    write_files(tmp_path, {"cat": ["a.png"]})
    path = tmp_path / "train.index"
    content = scan(tmp_path)
    path.write_bytes({"": b"", "shorter": content[:-1], "other bytes": content.replace(b"a.png", b"b.png")}[change])
    with pytest.raises(RunError, match=r"train\.index is damaged; if no file was added or removed"):
        FileIndex.open(path).verify()


@pytest.mark.parametrize("change", ["", "new file", "file gone", "new class", "folder gone", "moved"])
def test_a_change_in_any_folder_is_noticed_without_a_walk(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "train"
    write_files(folder, {"dog": ["more/a.png"], "cat": ["a.png"]})
    age(tmp_path)
    index = FileIndex(scan(folder))
    match change:
        case "new file":
            (folder / "cat" / "b.png").touch()
        case "file gone":
            (folder / "dog" / "more" / "a.png").unlink()
        case "new class":
            (folder / "eel").mkdir()
        case "folder gone":
            shutil.rmtree(folder / "dog" / "more")
        case "moved":
            folder = folder.rename(tmp_path / "moved")
    assert index.is_current(folder) == (not change)


def test_a_folder_that_has_just_changed_may_change_again_unnoticed(tmp_path: Path) -> None:
    write_files(tmp_path, {"cat": ["a.png"]})
    assert not FileIndex(scan(tmp_path)).is_current(tmp_path)


def test_a_process_that_finds_no_index_says_that_it_lists_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(tmp_path / "train", {"cat": ["a.png"]})
    data = ImageFolder(tmp_path)
    data.index_folder = tmp_path / "run"
    assert len(data.load("train")) == 1
    assert "train.index does not exist (is prepare_data overridden?): each process lists the files itself" in caplog.text


def folder_run(root: Path, steps: int, *more: str) -> list[str]:
    return [
        *("--model", "lockstep.models.Classifier", "--model.network", "lockstep.models.MLP"),
        *("--model.network.shape", "[3, 8, 8]", "--model.network.num_classes", "2", "--model.num_classes", "2"),
        *("--data", "lockstep.data.ImageFolder", "--data.root", str(root), "--data.size", "8", "--data.batch_size", "2"),
        *("--data.num_workers", "0", "--run.test_after_fit", "false"),
        *("--trainer.log_every_n_steps", "1", "--trainer.max_steps", str(steps), *more),
    ]


def test_a_run_walks_once_and_reads_the_same_files_in_all_attempts(
    launch: Launch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data, walks = tmp_path / "data", tmp_path / "walks"
    for split in ("train", "val"):
        write_files(data / split, {"cat": ["a.png", "b.png"], "dog": ["a.png", "b.png"]})
    age(data)
    monkeypatch.setattr(file_index._Walk, "__init__", counting(walks))
    run = launch("--ranks", "2", *folder_run(data, 1))
    assert run.status == 0
    assert walks.read_text().splitlines() == ["train", "val"]
    assert resume_run(launch, run, "--trainer.max_steps", "2").status == 0
    assert walks.read_text().splitlines() == ["train", "val"]

    write_files(data / "train", {"cat": ["new.png"]})
    assert resume_run(launch, run, "--trainer.max_steps", "3").status == 0
    assert "1 file (cat/new.png) of" in capfd.readouterr().err
    (data / "train" / "dog" / "b.png").unlink()
    assert resume_run(launch, run, "--trainer.max_steps", "4").status == USAGE
    assert "1 file (dog/b.png) of" in capfd.readouterr().err
    assert resume_run(launch, run, "--trainer.max_steps", "4", "--data.on_corrupt", "skip").status == 0


def test_an_image_that_cannot_be_read_now_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the run would have other samples than an undisturbed one."""
    write_files(tmp_path / "train", {"cat": ["a.png"], "dog": ["a.png"]})
    write_files(tmp_path / "val", {"cat": ["a.png"], "dog": ["a.png"]})
    data = ImageFolder(tmp_path, size=8, batch_size=2, num_workers=0, on_corrupt="skip")
    data.prepare_data()
    data.setup("fit")

    def stale(*_: Any) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("lockstep.data.image_folder.ImageFiles.read", stale)
    with pytest.raises(StorageError, match=r"a.png cannot be read \(Stale file handle\)\."):
        next(iter(data.train_dataloader()))


def counting(log: Path) -> Callable[[file_index._Walk, Path], None]:
    """The constructor of a walk, which adds the name of its folder to ``log``."""
    walk = file_index._Walk.__init__

    def counted(self: file_index._Walk, folder: Path) -> None:
        with log.open("a") as file:
            file.write(f"{folder.name}\n")
        walk(self, folder)

    return counted
