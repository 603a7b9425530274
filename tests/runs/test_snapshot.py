"""The contents of a snapshot, in a checkout and in a plain folder."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lockstep.core.errors import RunError, UsageError
from lockstep.runs import copied_files, snapshot
from lockstep.runs.snapshot import take_snapshot, verify_snapshot


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with two modules, bytecode, and an earlier run with its own snapshot."""
    folder = tmp_path / "pro ject"
    for name in ("train me.py", "inner/größe.py", "inner/__pycache__/a.pyc", "runs/x/20260101-000000-ab12/code/project/old.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True, capture_output=True
    )


def snapshot_of(
    project: Path, run_id: str = "20260101-000001-cd34-000", secrets: tuple[str, ...] = ()
) -> tuple[Path, list[str]]:
    """Take a snapshot; return the run folder and the project's files in it."""
    run = project / "runs/x" / run_id
    run.mkdir(parents=True)
    code = take_snapshot(project, run, (), secrets, project.parent / "caches")
    verify_snapshot(run, code.digest)
    copies = run / "code" / "project"
    return run, sorted(str(path.relative_to(copies)) for path in copies.rglob("*") if not path.is_dir() or path.is_symlink())


def test_a_plain_folder_excludes_bytecode_and_runs(project: Path) -> None:
    run, files = snapshot_of(project)
    assert files == ["inner/größe.py", "train me.py"]
    assert (run / "code/lockstep/lockstep/core/world.py").exists() and not (run / "changes.patch").exists()


def test_a_checkout_includes_uncommitted_and_excludes_ignored_files(project: Path) -> None:
    (project / ".gitignore").write_text("*.pyc\nsecret.txt\n")
    (project / "gone.py").write_text("")
    git(project, "init")
    git(project, "add", "train me.py", "gone.py")
    git(project, "commit", "-m", "first")
    (project / "train me.py").write_text("changed")
    (project / "gone.py").unlink()
    (project / "secret.txt").write_text("ignored")
    (project / "link.py").symlink_to("train me.py")
    run, files = snapshot_of(project)
    assert files == [".gitignore", "inner/größe.py", "link.py", "train me.py"]
    assert (run / "code/project/link.py").read_text() == "changed"
    assert "+changed" in (run / "changes.patch").read_text()


def test_links_point_to_the_copies_of_their_targets(project: Path) -> None:
    (project / "absolute.py").symlink_to(project / "train me.py")
    (project / "folder").symlink_to("inner")
    (project / "out").symlink_to("/usr/bin")
    run, files = snapshot_of(project)
    assert files == ["absolute.py", "folder", "inner/größe.py", "out", "train me.py"]
    (project / "train me.py").write_text("edited")
    copies = run / "code/project"
    assert (copies / "absolute.py").read_text() == "train me.py" and (copies / "folder/größe.py").exists()
    assert (copies / "out").readlink() == Path("/usr/bin")


def test_entries_of_the_python_path_are_replaced_by_their_copies(project: Path) -> None:
    run = project / "run"
    run.mkdir()
    paths = take_snapshot(project, run, [project / "inner", Path("/elsewhere")], (), project / "caches").paths
    copies = run / "code"
    assert paths == (copies / "project", copies / "project/inner", Path("/elsewhere"), copies / "lockstep")


def test_files_that_have_not_changed_are_linked_to_their_copies(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("train me.py", "inner/größe.py")
    for name in names:
        os.utime(project / name, ns=(10**18, 10**18))
    new, _ = snapshot_of(project, "20260101-000001-0000")
    monkeypatch.setattr(copied_files, "_RECENT_NS", -(10**10))
    first, _ = snapshot_of(project, "20260101-000002-0000")
    assert not (first / "code/project" / names[0]).samefile(new / "code/project" / names[0]), "a new file is copied"
    second, files = snapshot_of(project, "20260101-000003-0000")
    for name in (*(f"project/{name}" for name in names), "lockstep/lockstep/core/world.py"):
        assert (second / "code" / name).samefile(first / "code" / name), name
    assert files == sorted(names) and (second / "code.sha256").read_bytes() == (first / "code.sha256").read_bytes()

    (project / names[0]).write_text("TRAIN ME.PY")  # as long, and with the time of before
    os.utime(project / names[0], ns=(10**18, 10**18))
    (second / "code/project" / names[1]).write_text("edited in the copy")
    third, _ = snapshot_of(project, "20260101-000004-0000")
    assert [(third / "code/project" / name).read_text() for name in names] == ["TRAIN ME.PY", names[1]]
    with pytest.raises(UsageError, match="contains the W&B key"):
        snapshot_of(project, "20260101-000005-0000", secrets=("größe",))
    shutil.rmtree(third)
    for number, damage in enumerate(("{", '"files": {}', f'"files": {{"{names[0]}": []}}', f'"files": {{"{names[0]}": 7}}')):
        for cache in (project.parent / "caches").iterdir():
            known = json.loads(cache.read_text())
            cache.write_text(damage if damage == "{" else f'{{"secrets": "{known["secrets"]}", {damage}}}')
        fourth, _ = snapshot_of(project, f"20260101-000006-{number:04}")
        assert (fourth / "code/project" / names[0]).read_text() == "TRAIN ME.PY"


def test_a_changed_file_a_missing_file_and_another_snapshot_are_rejected(project: Path) -> None:
    run, _ = snapshot_of(project)
    code = take_snapshot(project, project / "runs", [], (), project / "caches")
    with pytest.raises(RunError, match="not what was submitted"):
        verify_snapshot(run, "0" * 64)
    file = project / "runs/code/project/train me.py"
    file.write_text("other")
    with pytest.raises(RunError, match=r"train me\.py is changed"):
        verify_snapshot(project / "runs", code.digest)
    file.unlink()
    with pytest.raises(RunError, match=r"train me\.py is missing"):
        verify_snapshot(project / "runs", code.digest)


def test_a_secret_and_too_many_or_too_large_files_are_rejected(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="contains the W&B key"):
        snapshot_of(project, secrets=("train me",))
    monkeypatch.setattr(snapshot, "LIMIT_FILES", 1)
    with pytest.raises(UsageError, match=r"more than 1 files; add it to \.gitignore"):
        take_snapshot(project, project / "runs/y", [], (), project / "caches")
    monkeypatch.setattr(snapshot, "LIMIT_FILES", 100)
    monkeypatch.setattr(snapshot, "LIMIT_MB", 0)
    with pytest.raises(UsageError, match=r"larger than 0 MB, .* alone has 0 MB"):
        take_snapshot(project, project / "runs/z", [], (), project / "caches")


@pytest.mark.parametrize("slow", [False, True])
def test_many_files_and_what_is_not_a_file(project: Path, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    monkeypatch.setattr(snapshot, "_SLOW_SECONDS", -1.0 if slow else 60.0)  # with threads, and without
    names = [f"inner/{number}.py" for number in range(100)]
    for name in names:
        (project / name).write_text(name)
    (project / "inner/1.py").chmod(0o700)
    os.mkfifo(project / "pipe")
    run, files = snapshot_of(project)
    assert files == sorted(["inner/größe.py", "train me.py", *names])
    assert (run / "code/project/inner/1.py").stat().st_mode & 0o777 == 0o700
    (run / "code/project/inner/99.py").write_text("changed")
    digest = hashlib.sha256((run / "code.sha256").read_bytes()).hexdigest()
    with pytest.raises(RunError, match=r"inner/99\.py is changed"):
        verify_snapshot(run, digest)
    (project / "inner/99.py").write_text("a key")
    with pytest.raises(UsageError, match=r"inner/99\.py contains the W&B key"):
        snapshot_of(project, "20260101-000002-cd34-000", secrets=("a key",))


def test_a_file_that_vanishes_and_a_tracked_folder_that_is_a_link_now(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(project, "init")
    git(project, "add", "inner")
    git(project, "commit", "-m", "first")
    (project / "inner").rename(project / "moved")
    (project / "inner").symlink_to("moved")
    (project / "temporary.py").write_text("")
    state = snapshot._state

    def vanish(root: Path, name: str) -> os.stat_result | None:
        found = state(root, name)
        if name == "temporary.py":
            (project / name).unlink()
        return found

    monkeypatch.setattr(snapshot, "_state", vanish)
    run, files = snapshot_of(project)
    assert {"inner", "moved/größe.py", "train me.py"} <= set(files) and "temporary.py" not in files
    assert (run / "code/project/inner/größe.py").read_text() == "inner/größe.py"


def test_a_tracked_folder_that_is_a_file_now(project: Path) -> None:
    git(project, "init")
    git(project, "add", "inner")
    shutil.rmtree(project / "inner")
    (project / "inner").write_text("x = 1")
    assert snapshot_of(project)[1] == ["inner", "train me.py"]


def test_a_checkout_that_git_cannot_read_is_one_sentence(project: Path) -> None:
    git(project, "init")
    (project / ".git/index").write_text("damaged")
    with pytest.raises(
        UsageError, match=r"^snapshot: git refuses the checkout around .*index.*; fix that, or use --no-snapshot\.$"
    ):
        snapshot_of(project)


def test_a_folder_that_cannot_be_read_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "closed").mkdir()
    scan = os.scandir

    def refuse(path: str) -> Any:  # root reads folders of any mode
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        UsageError, match=r"^snapshot: the folder .*/closed cannot be read \(Permission denied\); make it readable"
    ):
        snapshot_of(project)
