"""Imports go one way, and what a launcher needs is free of torch. Two subprocesses, no training."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

TORCH_FREE = ["check", "job", "profile", "queue", "run", "submission", "world"]
"""With all that they import."""


@pytest.mark.parametrize("room", TORCH_FREE)
def test_the_launchers_rooms_import_no_torch(room: str) -> None:
    code = f"import sys, lockstep.{room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_launch_scripts_import_no_torch_until_they_train() -> None:
    for script in sorted((REPO / "launch").glob("*.py")):
        code = f"import sys; sys.path.insert(0, 'launch'); import {script.stem}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def test_imports_go_one_way() -> None:
    above = {"lockstep.train": {"local.py", "job.py"}, "lockstep.local": set()}
    for path in (REPO / "src").rglob("*.py"):
        names = imported(path)
        assert not any(name == "launch" or name.startswith("launch.") for name in names), path
        assert "pytorch_lightning" not in names, f"{path}: lightning has one name here"
        for module, allowed in above.items():
            if path.name not in allowed:
                assert module not in names, f"{path} imports {module}"


def test_the_data_do_not_know_the_trainer() -> None:
    for path in (REPO / "src" / "lockstep" / "data").glob("*.py"):
        own = {name for name in imported(path) if name.startswith("lockstep.") and not name.startswith("lockstep.data")}
        assert own <= {"lockstep.disk", "lockstep.errors", "lockstep.order"}, (path, own)
