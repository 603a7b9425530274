"""Copies of shards on a disk of a node: what is copied, when it is read, and which process copies."""

import io
import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lockstep.config import with_config
from lockstep.core import World
from lockstep.core.errors import RunError
from lockstep.core.files import atomic_write_json
from lockstep.data.packed import local_copy, reader
from lockstep.data.packed.local_copy import copy_folder, copy_shards
from lockstep.data.packed.reader import ShardReader
from lockstep.data.packed.scan import find_index
from lockstep.trainer import preload
from lockstep.trainer.config_parser import parse_config


def make_shards(folder: Path, shards: int = 2, samples: int = 4) -> Path:
    """Shards of small images of two classes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for sample in range(samples):
                image = io.BytesIO()
                Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(image, "JPEG")
                for suffix, content in (("jpg", image.getvalue()), ("cls", str(sample % 2).encode())):
                    member = tarfile.TarInfo(f"{shard}-{sample}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def fields(reader: ShardReader, sample: int) -> dict[str, bytes]:
    return {entry.field: reader.read(entry) for entry in reader.index.entries(sample)}


def test_a_shard_is_read_from_its_copy_once_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(tmp_path / "train")
    copies = copy_folder(tmp_path / "disk", folder)
    monkeypatch.setattr(reader, "_LOOK_SECONDS", 0.0)
    shards = ShardReader(folder, find_index(folder), copies)
    before = [fields(shards, sample) for sample in range(8)]
    copy_shards(folder, copies, start=0.5)
    assert sorted(path.name for path in copies.iterdir()) == [".lock", "0.tar", "1.tar"]
    times = {path: path.stat().st_ctime_ns for path in copies.glob("*.tar")}
    assert fields(shards, 0) == before[0]  # it has looked
    (folder / "0.tar").rename(tmp_path / "gone.tar")
    assert [fields(shards, sample) for sample in range(8)] == before
    (tmp_path / "gone.tar").rename(folder / "0.tar")
    copy_shards(folder, copies)
    assert {path: path.stat().st_ctime_ns for path in copies.glob("*.tar")} == times, "a copy that is there was made again"

    os.utime(folder / "1.tar")  # packed again
    copy_shards(folder, copies)
    assert (copies / "1.tar").stat().st_ctime_ns > times[copies / "1.tar"]
    os.truncate(copies / "0.tar", 600)  # the disk fails
    assert fields(shards, 3) == before[3]


def test_pixels_are_viewed_in_the_original_if_the_copy_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_shards(tmp_path / "train", shards=1)
    copies = copy_folder(tmp_path / "disk", folder)
    copy_shards(folder, copies)
    shards = ShardReader(folder, find_index(folder), copies)
    entry = next(iter(shards.index.entries(0)))
    (copies / "0.tar").rename(tmp_path / "gone.tar")
    monkeypatch.setattr(reader, "is_copy", lambda *paths: True)  # removed just after the look
    assert shards.view(entry).numpy().tobytes() == ShardReader(folder, shards.index).read(entry)


def test_a_damaged_shard_a_damaged_disk_and_a_folder_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(tmp_path / "train", shards=1)
    copies = copy_folder(tmp_path / "disk", folder)
    atomic_write_json(folder / "pack.json", {"shards": [{"name": "0.tar", "sha256": "0" * 64}]})
    with pytest.raises(RunError, match=r"train/0\.tar does not have its checksum in pack\.json"):
        copy_shards(folder, copies)
    (folder / "pack.json").unlink()
    fsync = os.fsync

    def damage(handle: int) -> None:
        os.pwrite(handle, b"x", 700)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", damage)
    with pytest.raises(RunError, match=r"0\.tar\.part: checksum mismatch after write"):
        copy_shards(folder, copies)
    assert [path.name for path in copies.iterdir()] == [".lock"]
    copies.chmod(0o777)
    with pytest.raises(RunError, match="can be written by others; remove it"):
        copy_shards(folder, copies)


def test_without_a_disk_the_ranks_read_the_originals(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, disk = make_shards(tmp_path / "train", shards=1), tmp_path / "disk"

    def copy(*folders: Path) -> str:
        process = multiprocessing.get_context("fork").Process(target=local_copy._main, args=(folders, disk, 0, 1, os.getpid()))
        process.start()
        process.join()
        assert process.exitcode == 0
        return capfd.readouterr().err

    missing = tmp_path / "val"
    assert f"data.copy_to: data.root: {missing} cannot be read (No such file or directory); the sh" in copy(missing, folder)
    assert (copy_folder(disk, folder) / "0.tar").exists()
    shutil.rmtree(disk)
    disk.touch()
    expected = f"data.copy_to: {disk}: File exists; the shards that have no copy are read from {folder}"
    assert expected in copy(folder)


def test_one_process_of_a_node_copies_what_its_command_reads(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        make_shards(tmp_path / "data" / split)
    keys = ("--data", "lockstep.data.Shards", "--data.root", str(tmp_path / "data"), "--data.copy_to", str(tmp_path / "disk"))
    config = parse_config(with_config([*keys, "--model.num_classes", "2"]))[1]
    others = set(multiprocessing.active_children())
    preload.copy_shards("fit", config, World(1, 2, 1, 2))
    assert not set(multiprocessing.active_children()) - others
    preload.copy_shards("test", config, World(2, 4, 0, 2))
    (process,) = set(multiprocessing.active_children()) - others
    process.join()
    copied = sorted(str(path.relative_to(tmp_path / "disk")).partition("-")[0] for path in (tmp_path / "disk").glob("*/*.tar"))
    assert process.exitcode == 0 and copied == ["test", "test"]
