"""Shards of others: every format of tar, the index, what is damaged; then labels and the DataModule."""

import gzip
import io
import json
import os
import pickle
import random
import tarfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.shards import jpeg, write_folders, write_tar
from torch import Tensor

from lockstep.core import UsageError
from lockstep.core.errors import RunError
from lockstep.data import ShardDataset, Shards
from lockstep.data.image_folder import CorruptFile, ImageFiles
from lockstep.data.packed import scan
from lockstep.data.packed.index import ShardIndex
from lockstep.data.packed.mapping import MappedFile
from lockstep.pack.command import main

LONG = "folder.with.dots/" + "long/" * 40


def samples(prefix: str = "") -> dict[str, bytes]:
    """The files of five samples with several fields, of lengths around a block, and what is not a sample."""
    files = {f"{prefix}ä/": b""} | {"__meta__": b"of all", f"{prefix}.hidden": b"no"}
    for number in range(5):
        files |= {
            f"{prefix}ä/{number:06d}.JPG": jpeg(50 * number),
            f"{prefix}ä/{number:06d}.cls": b"%d" % (number % 3),
            f"{prefix}ä/{number:06d}.mask.bin": bytes([number]) * (510 + number),
        }
    return files


@pytest.mark.parametrize(
    ("tar_format", "prefix"),
    [
        (tarfile.USTAR_FORMAT, ""),
        (tarfile.USTAR_FORMAT, LONG[:122]),
        (tarfile.GNU_FORMAT, LONG),
        (tarfile.PAX_FORMAT, LONG),
    ],
    ids=["webdataset", "ustar-prefix", "gnu", "pax"],
)
def test_any_field_of_any_sample_is_read_in_any_order(tmp_path: Path, tar_format: int, prefix: str) -> None:
    files = samples(prefix)
    for number in range(2):
        write_tar(tmp_path / f"part-{number}.tar", files, tar_format)
    (tmp_path / "notes.txt").touch()
    data = ShardDataset(tmp_path, decode=False)
    assert len(data) == 10 and (tmp_path / "shards.index").exists()
    for copy in (data, pickle.loads(pickle.dumps(data))):
        for number in (9, 0, 4, 5, -1):
            key = f"{prefix}ä/{number % 5:06d}"
            contents = {name.lower(): files[f"{key}.{name}"] for name in ("JPG", "cls", "mask.bin")}
            assert copy[number] == {"__key__": key, **contents}
    assert data.reader.index.labels.tolist() == [0, 1, 2, 0, 1] * 2
    with pytest.raises(IndexError):
        data[10]


def test_fields_are_decoded_by_their_names(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.arange(6).reshape(2, 3))
    files = {"jpg": jpeg(), "cls": b"7", "json": b'{"a": [1]}', "txt": "ä".encode(), "npy": array.getvalue(), "x": b"\0"}
    write_tar(tmp_path / "a.tar", {f"k.{name}": content for name, content in files.items()} | {"k2.jpg": b"no image"})
    sample = (data := ShardDataset(tmp_path))[0]
    assert sample.pop("jpg").shape == (3, 10, 12) and sample.pop("npy").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert sample == {"__key__": "k", "cls": 7, "json": {"a": [1]}, "txt": "ä", "x": b"\0"}
    with pytest.raises(RunError, match=r"a\.tar: k2\.jpg is damaged \(.*\); set decode=False"):
        data[1]
    assert ShardDataset(tmp_path, fields=["cls"], transform=lambda sample: sample["cls"])[0] == 7
    with pytest.raises(UsageError, match=r"fields: no sample in .* has png; they have jpg, cls, json, txt, npy, x\."):
        ShardDataset(tmp_path, fields=["png"])


def test_the_index_is_made_once_and_again_when_shards_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    index_shards = scan.index_shards

    def counted(*arguments: Any) -> bytes:
        made.append(1)
        return index_shards(*arguments)

    monkeypatch.setattr(scan, "index_shards", counted)
    path = write_tar(tmp_path / "a.tar", samples())
    ShardDataset(tmp_path)
    ShardDataset(tmp_path)
    assert len(made) == 1
    write_tar(tmp_path / "b.tar", samples())
    assert (len(ShardDataset(tmp_path)), len(made)) == (10, 2)
    os.utime(path, (1e9, 1e9))
    ShardDataset(tmp_path)
    assert len(made) == 3
    index = tmp_path / "shards.index"
    for content in (b"", index.read_bytes()[:-1], index.read_bytes().replace(b"000003", b"000009")):
        index.write_bytes(content)
        assert ShardDataset(tmp_path, decode=False)[3]["__key__"] == "ä/000003"
    assert len(made) == 6


def test_a_folder_that_cannot_be_written_is_indexed_in_memory(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples())
    (tmp_path / ".shards.index.lock").mkdir()  # root may write any folder
    data = ShardDataset(tmp_path, decode=False)
    assert pickle.loads(pickle.dumps(data))[4]["cls"] == b"1"
    assert not (tmp_path / "shards.index").exists()


def test_processes_that_start_together_make_the_index_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", samples())
    index_shards, made = scan.index_shards, tmp_path / "made"

    def slow(*arguments: Any) -> bytes:
        with made.open("a") as file:
            file.write("x")
        time.sleep(0.2)
        return index_shards(*arguments)

    monkeypatch.setattr(scan, "index_shards", slow)
    processes = [get_context("fork").Process(target=ShardDataset, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert ([process.exitcode for process in processes], made.read_text()) == ([0, 0, 0], "x")


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def overwrite(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def add_link(path: Path) -> None:
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        tar.addfile(link)


def write_negative_size(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("0.jpg")
        member.pax_headers = {"size": "-1536"}  # back to the pax header
        tar.addfile(member)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: cut(path, 2512), r"a\.tar is truncated in '1\.jpg', which has 700 bytes, of which 464 are there"),
    (lambda path: cut(path, 1536), r"a\.tar is truncated: it ends after '0\.jpg', without the end mark"),
    (lambda path: cut(path, 0), r"a\.tar is empty"),
    (
        lambda path: overwrite(path, 1540, b"?"),
        r"a\.tar is damaged, or not a tar file: no header after '0\.jpg', at byte",
    ),
    (lambda path: path.write_bytes(b"x" * 2000), r"a\.tar is damaged, or not a tar file: no header after its beginning"),
    (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), r"a\.tar is compressed \(gzip\).*decompress it"),
    (lambda path: path.rename(f"{path}.gz"), r"a\.tar\.gz is compressed \(gz\)"),
    (
        lambda path: path.write_bytes(2 * path.read_bytes()),
        r"a\.tar has more after the end mark at byte 3,072; join tar",
    ),
    (write_negative_size, r"a\.tar is damaged, or not a tar file: no header after its beginning"),
    (add_link, r"a\.tar: 'link\.jpg' is a link, without its content; use tar --dereference"),
    (lambda path: write_tar(path, {"0.JPG": b"", "0.jpg": b""}), r"a\.tar has '0\.jpg' twice in a row"),
    (lambda path: path.unlink(), r"train holds no \.tar file; lockstep pack makes them"),
    (
        lambda path: (path.parent / ".pack").mkdir(),
        r"packing of .*/train has not finished; run the same lockstep pack",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_shard_is_named_with_its_member(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    path = write_tar(tmp_path / "train" / "a.tar", {"0.jpg": b"x" * 600, "1.jpg": b"y" * 700})
    damage(path)
    with pytest.raises(UsageError, match=rf"^data\.root: .*{message}"):
        ShardDataset(tmp_path / "train")


def test_pixels_that_are_truncated_after_the_file_was_mapped_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(9000))

    def read() -> None:
        mapped = MappedFile(tmp_path / "a", 9000)
        assert mapped.view(5000, 4000).sum() == 0
        os.truncate(tmp_path / "a", 4096)
        with pytest.raises(OSError, match="its disk fails, or it was truncated"):
            mapped.view(5000, 4000).sum()

    process = get_context("fork").Process(target=read)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_shard_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{name}.tar", {f"{number}.bin": bytes(5000) for number in range(4)}) for name in "abc"]
    data = ShardDataset(tmp_path)
    data[0]
    cut(paths[0], 4096)
    with pytest.raises(RunError, match=r"a\.tar: 2\.bin cannot be read \(its disk fails, or it was truncated"):
        data[2]
    cut(paths[1], 4096)
    with pytest.raises(RunError, match=r"b\.tar: 0\.bin cannot be read \(it has 4,096 bytes, and had 30,720"):
        data[4]
    paths[2].unlink()
    with pytest.raises(RunError, match=r"c\.tar: 3\.bin cannot be read \(No such file"):
        data[11]


def write_labels(root: Path, labels: dict[str, list[tuple[str, bytes]]]) -> None:
    for split, fields in labels.items():
        files: dict[str, bytes] = {}
        for number, (name, content) in enumerate(fields):
            files |= {f"{number}.jpg": jpeg(number), f"{number}.{name}": content}
        write_tar(root / split / "a.tar", files)


@pytest.mark.parametrize(
    ("fields", "labels", "classes"),
    [
        ([("cls", b"2"), ("cls", b" 0\n")], [2, 0], ["0", "1", "2"]),
        ([("cls", b"eel"), ("cls", b"cat"), ("cls", b"eel")], [1, 0, 1], ["cat", "eel"]),
        ([("json", b'{"label": 1}'), ("json", b'{"cls": 0}')], [1, 0], ["0", "1"]),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path, fields: list[tuple[str, bytes]], labels: list[int], classes: list[str]
) -> None:
    write_labels(tmp_path, {"train": fields, "val": fields})
    data = Shards(root=tmp_path, size=8, batch_size=len(fields))
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert (batch[1].tolist(), data.classes, data.num_classes) == (labels, classes, len(classes))
    assert data.load("train").targets == labels


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([("cls", b"1")], [("cls", b"2")], r"val has the label 2, but the labels of .*train end at 1;"),
        ([("cls", b"a"), ("cls", b"b")], [("cls", b"a")], "have different classes: b only in one of them"),
        ([("cls", b"1")], [("txt", b"x")], r"val/a\.tar: sample '0' has no label: a number or a name in its cls"),
        ([("cls", b"1"), ("png", b"")], [("cls", b"1")], r"train/a\.tar: sample '1' has more than one image"),
        ([("cls", b"99999999")], [("cls", b"1")], r"sample '0' has a label that is too high"),
    ],
)
def test_what_a_classifier_cannot_learn_is_refused(tmp_path: Path, train: Any, val: Any, message: str) -> None:
    write_labels(tmp_path, {"train": train, "val": val})
    with pytest.raises(UsageError, match=message):
        Shards(root=tmp_path).setup("fit")


def test_fewer_classes_in_another_split_are_numbered_as_in_training(tmp_path: Path) -> None:
    write_labels(tmp_path, {"train": [("cls", b"3")], "test": [("cls", b"1")]})
    data = Shards(root=tmp_path, size=8)
    data.setup("test")
    assert data.num_classes == 4


def test_a_sample_without_an_image_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "a.tar", {"0.jpg": jpeg(), "0.cls": b"0", "1.cls": b"0"})
    with pytest.raises(UsageError, match=r"a\.tar: sample '1' has no jpg, jpeg, png or npy; for other data"):
        Shards(root=tmp_path).load("train")


def test_a_run_starts_once_its_shards_are_mended(tmp_path: Path) -> None:
    data = Shards(root=tmp_path)
    write_tar(tmp_path / "train" / "a.tar", {"0.jpg": b"x"})
    with pytest.raises(UsageError, match="has no label"):
        data._prepare_index(tmp_path / "train", tmp_path / "run" / "train.index")
    write_tar(tmp_path / "train" / "a.tar", {"0.jpg": b"x", "0.cls": b"0"})
    data._prepare_index(tmp_path / "train", tmp_path / "run" / "train.index")


def test_the_image_is_found_among_other_fields_or_named(tmp_path: Path) -> None:
    others = {"0.mask.png": b"", "0.vector.npy": b"", "0.small.jpg": jpeg(9), "0.cls": b"0"}
    write_tar(tmp_path / "train" / "a.tar", {"0.jpg": jpeg(200), **others})
    write_tar(tmp_path / "val" / "a.tar", others)
    assert Shards(root=tmp_path).load("train").read(0) == jpeg(200)
    assert Shards(root=tmp_path, image="small.jpg").load("train").read(0) == jpeg(9)
    with pytest.raises(UsageError, match=r"val/a\.tar: sample '0' has more than one image; name the field .* with data\.image"):
        Shards(root=tmp_path).load("val")
    with pytest.raises(UsageError, match=r"data\.image: no sample in .*val has jpg; they have mask\.png, vector\.npy"):
        Shards(root=tmp_path, image="jpg").load("val")


def test_stored_pixels_are_the_decoded_ones_and_stay_as_they_are(tmp_path: Path) -> None:
    write_folders(tmp_path / "src", 4, ["train"])
    for kind in ([], ["--raw"]):
        assert main([str(tmp_path / "src"), str(tmp_path / f"out{len(kind)}"), *kind, "--workers", "0"]) == 0
    encoded, raw = (Shards(root=tmp_path / f"out{number}", size=40).load("train") for number in (0, 1))
    for number in range(4):
        pair = []
        for data in (encoded, raw):
            random.seed(number)
            pair.append(image_of(data, number))
        assert torch.equal(*pair)
        pair[1].zero_()  # a view of the shard would crash


def image_of(data: ImageFiles, index: int) -> Tensor:
    """The image of a sample."""
    sample = data[index]
    assert isinstance(sample, tuple) and isinstance(sample[0], Tensor)
    return sample[0]


def test_a_damaged_image_is_named_with_its_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "a.tar", {"0.jpg": jpeg()[:200], "0.cls": b"0", "1.npy": b"no array", "1.cls": b"0"})
    files = Shards(root=tmp_path).load("train")
    for number, name in enumerate(("0.jpg", "1.npy")):
        sample = files[number]
        assert isinstance(sample, CorruptFile) and sample.path == f"{tmp_path}/train/a.tar: {name}"
        assert f"a.tar: {name} is not a complete JPEG or PNG (" in sample.error


def test_index_of_lockstep_names_its_classes(tmp_path: Path) -> None:
    write_folders(tmp_path / "src", 4, ["train"])
    main([str(tmp_path / "src" / "train"), str(tmp_path / "out"), "--workers", "0"])
    first = (tmp_path / "out" / "shards.index").read_bytes()
    (tmp_path / "out" / "shards.index").unlink()
    assert ShardDataset(tmp_path / "out").reader.index.classes == ["cat", "dog"]
    (tmp_path / "out" / "000000.tar").rename(tmp_path / "out" / "other.tar")
    with pytest.raises(UsageError, match=r"out/000000\.tar was packed, and is missing; copy it again"):
        ShardDataset(tmp_path / "out")
    (tmp_path / "out" / "pack.json").write_text('{"shards": [1]}')
    with pytest.raises(UsageError, match=r"out/pack\.json is damaged; copy it again, or remove it"):
        ShardDataset(tmp_path / "out")
    header = json.loads((tmp_path / "out" / "shards.index").read_bytes().partition(b"\n")[0])
    assert header["sha256"] == json.loads(first.partition(b"\n")[0])["sha256"]
    assert isinstance(ShardIndex(first), ShardIndex)
