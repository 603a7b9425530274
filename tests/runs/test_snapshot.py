"""What a snapshot of the code holds, in a checkout and in a plain folder; no Slurm and no torch."""

import subprocess
from pathlib import Path

import pytest

import lockstep
from lockstep.core.errors import RunError, UsageError
from lockstep.runs import snapshot
from lockstep.runs.snapshot import take_snapshot, verify_snapshot

PACKAGE = Path(lockstep.__file__).parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with two modules, something compiled, and a run of before with its own snapshot."""
    folder = tmp_path / "pro ject"
    for name in ("train me.py", "inner/größe.py", "inner/__pycache__/a.pyc", "runs/x/20260101-000000-ab12/code/project/old.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True, capture_output=True
    )


def taken(project: Path, python_path: str = "", secrets: tuple[str, ...] = ()) -> tuple[Path, list[str]]:
    """The run folder, and what of the project is in its snapshot."""
    run = project / "runs/x/20260101-000001-cd34-000"
    run.mkdir(parents=True)
    code = take_snapshot(project, PACKAGE, run, python_path, secrets)
    verify_snapshot(run, code.digest)
    copies = run / "code" / "project"
    return run, sorted(str(path.relative_to(copies)) for path in copies.rglob("*") if not path.is_dir() or path.is_symlink())


def test_a_plain_folder_without_compiled_files_and_runs(project: Path) -> None:
    run, files = taken(project)
    assert files == ["inner/größe.py", "train me.py"]
    assert (run / "code/lockstep/lockstep/core/world.py").exists() and not (run / "changes.patch").exists()


def test_a_checkout_with_what_is_not_committed_and_without_what_is_ignored(project: Path) -> None:
    (project / ".gitignore").write_text("*.pyc\nsecret.txt\n")
    (project / "gone.py").write_text("")
    git(project, "init")
    git(project, "add", "train me.py", "gone.py")
    git(project, "commit", "-m", "first")
    (project / "train me.py").write_text("changed")
    (project / "gone.py").unlink()
    (project / "secret.txt").write_text("ignored")
    (project / "link.py").symlink_to("train me.py")
    run, files = taken(project)
    assert files == [".gitignore", "inner/größe.py", "link.py", "train me.py"]
    assert (run / "code/project/link.py").read_text() == "changed"
    assert "+changed" in (run / "changes.patch").read_text()


def test_links_lead_to_copies_where_there_are_any(project: Path) -> None:
    (project / "absolute.py").symlink_to(project / "train me.py")
    (project / "folder").symlink_to("inner")
    (project / "out").symlink_to("/usr/bin")
    run, files = taken(project)
    assert files == ["absolute.py", "folder", "inner/größe.py", "out", "train me.py"]
    (project / "train me.py").write_text("edited")
    copies = run / "code/project"
    assert (copies / "absolute.py").read_text() == "train me.py" and (copies / "folder/größe.py").exists()
    assert (copies / "out").readlink() == Path("/usr/bin")


def test_entries_of_the_python_path_become_their_copies(project: Path) -> None:
    run = project / "run"
    run.mkdir()
    paths = take_snapshot(project, PACKAGE, run, f"{project / 'inner'}:/elsewhere", ()).paths
    copies = run / "code"
    assert paths == (copies / "project", copies / "project/inner", Path("/elsewhere"), copies / "lockstep")


def test_a_changed_a_missing_and_another_snapshot_are_refused(project: Path) -> None:
    run, _ = taken(project)
    code = take_snapshot(project, PACKAGE, project / "runs", "", ())
    with pytest.raises(RunError, match="not what was submitted"):
        verify_snapshot(run, "0" * 64)
    file = project / "runs/code/project/train me.py"
    file.write_text("other")
    with pytest.raises(RunError, match=r"train me\.py is changed"):
        verify_snapshot(project / "runs", code.digest)
    file.unlink()
    with pytest.raises(RunError, match=r"train me\.py is missing"):
        verify_snapshot(project / "runs", code.digest)


def test_the_key_of_wandb_and_what_is_too_large_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="holds the W&B key"):
        taken(project, secrets=("train me",))
    monkeypatch.setattr(snapshot, "LIMIT_FILES", 1)
    with pytest.raises(UsageError, match=r"more than 1 files; name it in \.gitignore"):
        take_snapshot(project, PACKAGE, project / "runs/y", "", ())
    monkeypatch.setattr(snapshot, "LIMIT_FILES", 100)
    monkeypatch.setattr(snapshot, "LIMIT_MB", 0)
    with pytest.raises(UsageError, match=r"larger than 0 MB, .* alone has 0 MB"):
        take_snapshot(project, PACKAGE, project / "runs/z", "", ())
