"""The wheel: it has commands, configs and profiles, and works from a folder outside the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.runs import REPO

pytestmark = pytest.mark.timeout(170)

BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    for name in ("src", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPO / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def lockstep(installed: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run ``lockstep`` as the wheel has it."""
    code = "import sys, lockstep.cli as cli; assert cli.__file__.startswith(sys.path[1]), cli.__file__; sys.exit(cli.main())"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def test_the_wheel_has_what_it_needs_and_nothing_else(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    package = {name for name in names if name.startswith("lockstep/")}
    assert package | {name for name in names if ".dist-info/" in name} == names
    configs = {str(path.relative_to(REPO)) for path in (REPO / "configs").rglob("*.yaml")}
    assert {name.replace("lockstep/config/files", "configs") for name in package if name.endswith(".yaml")} == configs
    assert {Path(name).suffix for name in package} == {".py", ".yaml", ".gz", ".typed"}


def test_the_commands_of_the_wheel_work_anywhere(installed: Path, tmp_path: Path) -> None:
    assert lockstep(installed, tmp_path, "--version").stdout == "lockstep 0.1.0\n"
    done = lockstep(installed, tmp_path, "submit", "--nodes", "2", "--profile", "a100", "--config", "digitz")
    assert (done.returncode, done.stderr) == (2, "lockstep: config: digitz does not exist; did you mean 'digits'?\n")
    done = lockstep(installed, tmp_path, "submit", "--nodes", "2", "--profile", "a1000")
    assert done.returncode == 2 and done.stderr.endswith("did you mean 'a100'?\n")
    done = lockstep(installed, tmp_path, "local", "--config", "digits", "--trainer.max_epochs", "1")
    assert done.returncode == 0 and "digits" in done.stderr, done.stderr
    assert len(list(tmp_path.glob("runs/digits/*/result.json"))) == 1
    done = lockstep(installed, tmp_path, "train", "validate", "--config", "digits", "--ckpt_path", "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "ckpt_path: nowhere is neither" in done.stderr
