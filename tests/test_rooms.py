"""Rooms import one way and through their doors; the upper half needs neither torch, Lightning nor numpy."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import REPO

PACKAGE = REPO / "src" / "lockstep"

ROOMS = (
    "core",
    "compat",
    "config",
    "config.validation",
    "runs",
    "runs.report",
    "slurm",
    "slurm.submission",
    "slurm.cluster",
    "distributed",
    "data.loading",
    "data.packed",
    "data",
    "pack",
    "models",
    "strategies",
    "monitoring",
    "checkpoint",
    "trainer",
    "planning",
    "cli",
)
"""A room imports only rooms before it."""

UPPER_HALF = ROOMS[: ROOMS.index("distributed")]
TORCH_FREE_COMPAT = ("compat", "compat.pytorch_lightning", "compat.submitit")


def room_of(module: str) -> str:
    """The innermost room that holds a module of lockstep."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of lockstep, without the name of the package, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if name := ".".join(part for part in parts if part != "__init__"):
            yield name, path


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_one_way_and_through_doors(module: str, path: Path) -> None:
    here = room_of(module)
    for imported in imports(path):
        assert not imported.startswith(("launch", "pytorch_lightning")), imported
        if not imported.startswith("lockstep."):
            continue
        there = room_of(name := imported.removeprefix("lockstep."))
        assert ROOMS.index(there) <= ROOMS.index(here), f"{module} imports {imported}"
        if there != here and here != "cli":  # the command imports programs, which are not doors
            assert name == there or there == "compat", f"{module} imports {imported}, past the doors of {there}"


def test_the_upper_half_imports_without_torch_lightning_and_numpy() -> None:
    names = [name for name, _ in modules() if room_of(name) in UPPER_HALF and room_of(name) != "compat"]
    blocked = ("torch", "torchvision", "lightning", "numpy", "deepspeed", "wandb")
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({blocked!r}))
for name in {[*TORCH_FREE_COMPAT, *names]!r}:
    importlib.import_module(f"lockstep.{{name}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_command_imports_no_torch_until_it_trains() -> None:
    code = f"import sys; from lockstep.cli import {', '.join(path.stem for path in (PACKAGE / 'cli').glob('[a-z]*.py'))}; "
    assert subprocess.run([sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"]).returncode == 0


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_in_one_sentence_what_it_is_for(room: str) -> None:
    init = ast.parse((PACKAGE / room.replace(".", "/") / "__init__.py").read_text())
    sentence = (ast.get_docstring(init) or "").partition("\n\n")[0]
    assert sentence and "\n" not in sentence and sentence.endswith(".")


def test_folders_and_files_stay_small() -> None:
    for folder in (PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__")):
        entries = [path for path in folder.iterdir() if path.name not in ("__pycache__", "py.typed")]
        assert len(entries) <= 16, f"{folder} has {len(entries)} entries"
    for _, path in modules():
        assert len(path.read_text().splitlines()) <= 350, path


def test_the_architecture_page_names_the_rooms_in_their_order_and_files_that_exist() -> None:
    page = (REPO / "docs" / "architecture.md").read_text()
    rooms = page[page.index("## Rooms") : page.index("## Where is")]
    assert re.findall(r"^\| `([\w.]+)` \|", rooms, re.MULTILINE) == list(ROOMS)
    files = {path.name for path in PACKAGE.rglob("*.py")}
    drawing = page[page.index("```") : page.index("## Rooms")]
    for name in re.findall(r"(?<![\w/])(\w+\.py)\b", drawing):
        assert name in files, name
    for path in re.findall(r"\b((?:src|tests|launch)/[\w/]+\.py)", page):
        assert (REPO / path).exists(), path
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for name in re.findall(r"\b([A-Z]\w+[a-z])(?=[. (]\w*[\w.]*\.py\))|\b(\w+_\w+) \(\w+\.py\)", drawing):
        assert re.search(rf"\b(?:class|def) {''.join(name)}\b", sources), name
