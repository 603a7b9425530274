"""``lockstep pack``: what it writes, in this process; then workers, and a packing that is killed at each file it publishes."""

import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import REPO
from support.shards import jpeg, write_folders, write_tar
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from lockstep import cli
from lockstep.core import UsageError
from lockstep.core.errors import RunError
from lockstep.data import ImageFolder, ShardDataset, Shards
from lockstep.data.packed import decode_pixels
from lockstep.pack import packing
from lockstep.pack.command import main
from lockstep.pack.fields import encode_sample
from lockstep.pack.images import ImageOptions


def content(folder: Path) -> dict[str, bytes]:
    """All files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Folders with 11 images in train, and 4 in val."""
    write_folders(tmp_path / "src", 11, ["train"])
    write_folders(tmp_path / "src", 4, ["val"])
    return tmp_path / "src"


def test_shards_have_the_samples_of_the_folders_bit_for_bit(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (src / "train" / "cat" / "notes.txt").touch()
    (src / "train" / "loose.jpg").write_bytes(jpeg())
    (src / "train" / "cat" / "000a.jpg").write_bytes(jpeg()[:300])
    (src / "more").mkdir()
    out = tmp_path / "out"
    assert cli.main(["pack", str(src), str(out), "--shard-size", "5"]) == 0
    said = capsys.readouterr().out
    assert f"left out {src}/more: neither train, val nor test" in said
    assert f"{out}/train: 11 samples in 3 shards, 0.1 MB\n  left out 2, not a .jpg, .jpeg or .png file of a class: cat" in said
    assert "left out 1, cannot be decoded (Image is incomplete or truncated): cat/000a.jpg" in said
    assert {path.name for path in (out / "train").iterdir()} == {
        *(f"{number:06d}.tar" for number in range(3)),
        *("shards.index", "pack.json", ".shards.index.lock"),
    }
    (src / "train" / "cat" / "000a.jpg").unlink()
    for split in ("train", "val"):
        folder, shards = ImageFolder(root=src, size=8).load(split), Shards(root=out, size=8).load(split)
        assert (folder.classes, folder.targets) == (shards.classes, shards.targets)
        for number in range(len(folder)):
            assert folder.read(number) == shards.read(number)
            pair: list[Any] = []
            for data in (folder, shards):
                random.seed(number)
                pair.append(data[number])
            assert torch.equal(pair[0][0], pair[1][0])
    assert [ShardDataset(out / "train", decode=False)[number]["__key__"] for number in (0, 1)] == ["000000", "000002"]


def test_the_bytes_do_not_depend_on_workers_and_a_second_call_checks_them(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for workers in ("0", "3"):
        assert main([str(src), str(tmp_path / workers), "--shard-size", "3", "--shorter-side", "9", "--workers", workers]) == 0
    expected = content(tmp_path / "0")
    assert content(tmp_path / "3") == expected
    damaged = tmp_path / "3" / "train" / "000001.tar"
    damaged.write_bytes(damaged.read_bytes().replace(b"JFIF", b"JUNK"))
    (tmp_path / "3" / "train" / "000003.tar").unlink()
    index = tmp_path / "3" / "val" / "shards.index"
    index.write_bytes(index.read_bytes().replace(b"000002", b"000009"))
    capsys.readouterr()
    assert main([str(src), str(tmp_path / "3"), "--shard-size", "3", "--shorter-side", "9", "--workers", "2"]) == 0
    assert "11 samples in 4 shards, 0.0 MB; 2 shards kept, checksums verified" in capsys.readouterr().out
    assert content(tmp_path / "3") == expected


def test_images_are_resized_encoded_or_stored_as_pixels(src: Path, tmp_path: Path) -> None:
    name = src / "train" / "cat" / "004.jpg"  # 24 × 24
    Image.new("RGB", (40, 20), (200, 10, 10)).save(name)
    options = {"size": ["--shorter-side", "10"], "low": ["--quality", "5"], "raw": ["--raw", "--shorter-side", "10"]}
    for kind, flags in options.items():
        assert main([str(src / "train"), str(tmp_path / kind), *flags, "--workers", "0"]) == 0
    size, low, raw = (ShardDataset(tmp_path / kind, decode=False)[2] for kind in options)
    pixels = functional.resize(decode_pixels(name.read_bytes()), [10], antialias=True)
    assert np.array_equal(ShardDataset(tmp_path / "raw")[2]["npy"], pixels.permute(1, 2, 0).numpy())
    assert (decode_pixels(size["jpg"]).float() - pixels.float()).abs().mean() < 3
    assert decode_pixels(low["jpg"]).shape == (3, 20, 40) and len(low["jpg"]) < len(name.read_bytes())
    assert raw.keys() == {"__key__", "npy", "cls"}
    small = main([str(src / "train"), str(tmp_path / "same"), "--shorter-side", "30", "--workers", "0"])
    assert small == 0 and ShardDataset(tmp_path / "same", decode=False)[2]["jpg"] == name.read_bytes()


REFUSED = [
    (["--shard-size", "4"], r"train holds another packing: --shard-size was 5 and is 4; choose another folder"),
    (["--quality", "80"], r"--quality was None and is 80"),
    (["new file"], r"its images was 11 and is 12"),
    (["renamed"], r"its names sha256 was"),
    (["foreign"], r"other/train holds \.tar files that lockstep pack has not made"),
    (["busy"], r"another process is packing into it"),
    (["--raw", "--quality", "80"], r"--raw: stores pixels, which have no --quality"),
    (["--quality", "101"], r"--quality: 101 must be 100 or less"),
    (["--dataset.root", "x"], r"--dataset\.root: belongs to --dataset, which is not given"),
    (["--dataset", "torch.utils.data.TensorDataset"], r"SRC: give either a folder of images or --dataset CLASS"),
    (["inside"], r"OUT: .*src/out is in SRC"),
    (["missing"], r"SRC: .*/nothing is not a folder"),
    (["classes"], r"SRC: .*train and .*val have different classes: dog only in one of them"),
    (["empty class"], r"SRC: class folder .*eel holds no \.jpg, \.jpeg, \.png file"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_two_packings_are_not_mixed_and_mistakes_are_named(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[str], message: str
) -> None:
    out, flags = tmp_path / "out", change if change[0].startswith("--") else []
    base = ["--shard-size", "5", "--workers", "0"]
    main([str(src), str(out), *base])
    before, lock = content(out), None
    match change[0]:
        case "new file":
            (src / "train" / "cat" / "new.jpg").write_bytes(jpeg())
        case "renamed":
            (src / "train" / "cat" / "000.jpg").rename(src / "train" / "cat" / "00.jpg")
        case "foreign":
            write_tar(tmp_path / "other" / "train" / "a.tar", {})
            out = tmp_path / "other"
        case "busy":
            monkeypatch.setattr(packing, "_LOCK_SECONDS", 0.01)
            lock = packing.locked(out / "train")
            lock.__enter__()
        case "inside":
            out = src / "out"
        case "missing":
            src = tmp_path / "nothing"
        case "classes":
            for path in (src / "val" / "dog").iterdir():
                path.unlink()
            (src / "val" / "dog").rmdir()
        case "empty class":
            (src / "train" / "eel").mkdir()
    with pytest.raises(UsageError, match=message):
        main([str(src), str(out), *base, *flags])
    if lock is not None:
        lock.__exit__(None, None, None)
    assert content(tmp_path / "out") == before


def test_a_folder_of_classes_may_have_one_that_is_called_train(src: Path, tmp_path: Path) -> None:
    (src / "val").rename(src / "car")
    assert main([str(src), str(tmp_path / "out"), "--workers", "0"]) == 0
    assert ShardDataset(tmp_path / "out").reader.index.classes == ["car", "train"]


class Pairs(Dataset[Any]):
    """Random images, numbers, texts, and a sample that cannot be read."""

    classes = ("odd", "even")

    def __init__(self, length: int, broken: int = -1) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if index == self.broken or self.broken == -2:
            raise KeyError("no such row")
        return torch.randint(256, (3, 8, 8), dtype=torch.uint8), index % 2, "tëxt"


def test_any_map_style_dataset_is_packed_by_its_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = ["--dataset", f"{__name__}.Pairs", "--dataset.length", "6"]
    sizes = []
    for workers in ("0", "2"):
        flags = ["--shard-size", "4", "--workers", workers]
        assert main([str(tmp_path / workers), *pairs, "--dataset.broken=3", *flags]) == 0
        sizes.append(content(tmp_path / workers))
    assert sizes[0] == sizes[1]
    assert "5 samples in 2 shards" in (said := capsys.readouterr().out)
    assert "left out 1, KeyError: 'no such row': Pairs[3]" in said
    torch.manual_seed(1)
    sample = ShardDataset(tmp_path / "0")[1]
    assert torch.equal(sample.pop("png"), torch.randint(256, (3, 8, 8), dtype=torch.uint8))
    assert sample == {"__key__": "000001", "cls": 1, "txt": "tëxt"}
    assert ShardDataset(tmp_path / "0").reader.index.classes == ["odd", "even"]
    with pytest.raises(RunError, match=r"None of 4 samples can be packed; the first, Pairs\[0\]: KeyError"):
        main([str(tmp_path / "none"), *pairs, "--dataset.broken=-2", "--shard-size", "4", "--workers", "1"])
    with pytest.raises(UsageError, match=r"--dataset\.lenght: unknown argument of .*Pairs; did you mean 'dataset\.length'"):
        main([str(tmp_path / "no"), "--dataset", f"{__name__}.Pairs", "--dataset.lenght", "6"])
    for name, message in (("nope.Pairs", "cannot be imported"), (f"{__name__}.Pears", "has no class 'Pears'; did you mean")):
        with pytest.raises(UsageError, match=f"--dataset: .*{message}"):
            main([str(tmp_path / "no"), "--dataset", name])
    with pytest.raises(UsageError, match=r"Pairs cannot be made \(.*dataset\.length"):
        main([str(tmp_path / "no"), "--dataset", f"{__name__}.Pairs"])


def test_values_are_named_by_their_kind() -> None:
    image = Image.new("L", (4, 3), 7)
    array = np.arange(3.0)
    found = encode_sample((image, 3, "a", array, array, [1], jpeg(), b"x"), ImageOptions())
    assert list(found) == ["png", "cls", "txt", "npy", "4.npy", "json", "jpg", "bin"]
    assert (found["cls"], found["txt"], found["json"], found["bin"]) == (b"3", b"a", b"[1]", b"x")
    named = {"image": image, "label": np.int64(3), "caption": "a", "json": "{}", "mask": image, "id": 4, "__key__": "no"}
    assert list(encode_sample(named, ImageOptions())) == ["png", "cls", "caption.txt", "json", "mask.png", "id"]
    assert list(encode_sample(image, ImageOptions(quality=50))) == ["jpg"]
    for deep in (np.array([[0, 40_000]], np.uint16), np.array([[-1, 70_000]], np.int32), np.array([[0.5, 300]], np.float32)):
        stored = encode_sample({"mask": Image.fromarray(deep)}, ImageOptions())
        assert np.array_equal(np.load(io.BytesIO(stored["mask.npy"])), deep)
    assert list(encode_sample({"jpg": jpeg(), "cls": b"1"}, ImageOptions(raw=True))) == ["npy", "cls"]
    with pytest.raises(ValueError, match="two fields are named png"):
        encode_sample({"image": image, "png": image}, ImageOptions())
    with pytest.raises(ValueError, match="cannot be the name"):
        encode_sample({"a/b": 1}, ImageOptions())


def killed_at(publication: int, arguments: Sequence[str]) -> bool:
    """Pack in a fork that is killed at the given file that it publishes; whether there were so many."""

    def child() -> None:
        replace, calls = Path.replace, 0

        def counted(self: Path, target: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == publication:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = counted  # type: ignore[method-assign]
        sys.exit(main(arguments))

    process = get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_before_any_file_is_published_a_second_call_writes_the_same_bytes(src: Path, tmp_path: Path) -> None:
    flags = ["--shard-size", "6", "--workers", "0"]
    main([str(src / "train"), str(tmp_path / "whole"), *flags])
    whole = content(tmp_path / "whole")
    publication = 1
    while killed_at(publication, [str(src / "train"), str(tmp_path / str(publication)), *flags]):
        with pytest.raises(UsageError, match=r"has not finished; run the same lockstep pack command again|no \.tar file"):
            ShardDataset(tmp_path / str(publication))
        assert main([str(src / "train"), str(tmp_path / str(publication)), *flags]) == 0
        assert content(tmp_path / str(publication)) == whole
        publication += 1
    assert publication > 8  # plan, 2 records and shards, index and manifest, in two steps


def is_running(process: str) -> bool:
    """Whether a process exists and is not a zombie."""
    status = Path("/proc") / process / "status"
    return status.exists() and "State:\tZ" not in status.read_text()


class Gated(Dataset[Any]):
    """Numbers; those from 20 on wait until ``gate`` exists."""

    def __init__(self, gate: str) -> None:
        self.gate = Path(gate)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> int:
        while index >= 20 and not self.gate.exists():
            time.sleep(0.1)
        return index


def test_workers_end_with_a_killed_packing_which_a_second_call_completes(tmp_path: Path) -> None:
    dataset = ["--dataset", f"{__name__}.Gated", f"--dataset.gate={tmp_path}/gate", "--shard-size", "4", "--workers", "2"]
    process = get_context("fork").Process(target=main, args=([str(tmp_path / "out"), *dataset],))
    process.start()
    assert process.pid is not None
    children, workers = Path("/proc") / str(process.pid) / "task" / str(process.pid) / "children", list[str]()
    while len(list((tmp_path / "out").glob("*.tar"))) < 5 or len(workers) < 2:  # the first may be done before the second starts
        time.sleep(0.01)
        workers = children.read_text().split()
    process.kill()
    process.join()
    (tmp_path / "gate").touch()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert main([str(tmp_path / "out"), *dataset]) == 0
    assert (len(workers), len(kept)) == (2, 5) and not any(map(is_running, workers))
    main([str(tmp_path / "whole"), *dataset])
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())


def test_a_full_disk_and_a_killed_worker_are_named(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(src / "train"), str(tmp_path / "out"), "--workers", "1"]
    store_file = ImageOptions.store_file

    def killed(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ImageOptions, "store_file", killed)
    with pytest.raises(RunError, match=r"A worker ended with SIGKILL, perhaps out of memory: use fewer --workers; run"):
        main(arguments)
    monkeypatch.setattr(ImageOptions, "store_file", lambda *_: sys.exit(0))
    with pytest.raises(RunError, match=r"A worker ended with status 0; run"):
        main(arguments)
    monkeypatch.setattr(ImageOptions, "store_file", store_file)
    monkeypatch.setattr("lockstep.pack.shard.fsync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"A shard cannot be written \(No space left on device\); run the command again"):
        main(arguments)
    monkeypatch.undo()
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["shards"][0]["samples"] == 11


def test_the_module_is_the_command(src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = compile((REPO / "src/lockstep/pack/__main__.py").read_text(), "pack", "exec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pack", str(tmp_path / "no"), str(tmp_path / "out")])
        with pytest.raises(SystemExit) as ended:
            exec(code, {"__name__": "__main__"})
    assert ended.value.code == 2 and f"lockstep: SRC: {tmp_path}/no is not a folder" in capsys.readouterr().err
