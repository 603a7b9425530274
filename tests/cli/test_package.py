"""Wheel and source distribution: they have what they should, and commands, configs and profiles work from any folder.

``make readme`` trains with the wheel, in a new environment.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.runs import REPO
from support.wheel import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the distributions are built."""
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def installed(folder: Path) -> Path:
    """A folder with the content of the wheel."""
    zipfile.ZipFile(build("wheel", folder)).extractall(folder / "site")
    return folder / "site"


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


def test_the_source_distribution_has_the_package_and_nothing_else(folder: Path) -> None:
    with tarfile.open(build("sdist", folder)) as archive:
        names = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    package = {
        path.relative_to(REPO) for path in (REPO / "src/lockstep").rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    configs = {
        Path("src/lockstep/config/files", path.relative_to(REPO / "configs")) for path in (REPO / "configs").rglob("*.yaml")
    }
    others = {name for name in names - package - configs if name.parts[:2] != ("src", "lockstep.egg-info")}
    assert (package | configs) <= names
    assert {str(name) for name in others} == {
        *("pyproject.toml", "setup.cfg", "MANIFEST.in", "PKG-INFO"),
        *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"),
    }


def test_the_commands_of_the_wheel_work_anywhere(installed: Path, tmp_path: Path) -> None:
    assert lockstep(installed, tmp_path, "--version").stdout == "lockstep 0.1.0\n"
    done = lockstep(installed, tmp_path, "submit", "--nodes", "2", "--profile", "a100", "--config", "digitz")
    assert (done.returncode, done.stderr) == (2, "lockstep: config: digitz does not exist; did you mean 'digits'?\n")
    done = lockstep(installed, tmp_path, "submit", "--nodes", "2", "--profile", "a1000")
    assert done.returncode == 2 and done.stderr.endswith("did you mean 'a100'?\n")
    done = lockstep(installed, tmp_path, "local", "--config", "digits", "--trainer.max_epoch", "1")
    assert done.returncode == 2 and "unknown key; did you mean 'trainer.max_epochs'" in done.stderr
    assert not list(tmp_path.iterdir())
