"""Arguments of classes, found in their sources without an import.

User sources, then a fresh interpreter that lists its imports, then a comparison with jsonargparse on real packages.
"""

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import pytest
import torch.nn
from support.configs import DIGITS, said, written

from lockstep.config.validation.lookup import SourceIndex
from lockstep.config.validation.signature import signature
from lockstep.config.validation.source import Undecidable, statements


def test_statements_are_whole() -> None:
    text = (
        '@a(\n    1,\n)\n@b\nclass C(\n    D,\n):\n    """x\ny = 1\n"""\n\nif z:\n    q\nelse:\n    r\n# s\nt = [\n    1,\n]\n'
    )
    parts = list(statements(text))
    assert "".join(parts) == text
    assert [part.split()[0] for part in parts] == ["@a(", "if", "t"]


def write_user_module(folder: Path) -> None:
    """A package whose classes are hard to find statically; importing it raises."""
    (folder / "own").mkdir()
    written(folder / "own", "raise RuntimeError('imported')\nfrom .inner import Hidden\nfrom .inner import *\n", "__init__.py")
    written(
        folder / "own",
        "from __future__ import annotations\n"
        "import dataclasses\nfrom dataclasses import dataclass, field\nfrom typing import Any, Optional\n"
        "import torch.nn as nn\nfrom lockstep.models.classifier import Classifier as Base\n"
        "try:\n    from elsewhere import Unknown, wrap\nexcept ImportError:\n    pass\n"
        'TEXT = """\nclass NotThere:\n    pass\n"""\n'
        "Alias = Base\nSize = Optional[int]\nRATE = 0.1\n"
        "class Hidden(nn.Module):\n    def __init__(self, width: Size = None, *, depth: int): ...\n"
        "class Public(Hidden): ...\n"
        "class Passing(Base):\n    def __init__(self, extra: int = 1, **more):\n        super().__init__(lr=0.3, **more)\n"
        "class Using(Base):\n    def __init__(self, **kwargs):\n        super().__init__(**kwargs)\n        print(kwargs)\n"
        "class Ignoring(Base):\n    def __init__(self, a=1, **kwargs):\n        super().__init__()\n"
        "class Over(Unknown):\n    def __init__(self, a: int = 1):\n        super().__init__()\n"
        "class Under(Unknown): ...\n"
        "class Wrapped(Base):\n    @wrap\n    def __init__(self, a: int = 1): ...\n"
        "class Made(Base):\n    def __new__(cls, a: int = 1): ...\n"
        "@wrap\nclass Decorated(Base):\n    def __init__(self, a: int = 1): ...\n"
        "class Keeping(Base):\n    def __init__(self, a=1, **rest):\n        super().__init__()\n        self.rest = rest\n"
        "    def later(self):\n        return Hidden(width=1, **self.rest)\n"
        "@dataclass\nclass Fields(Base):\n    a: int = 1\n    b: float = field(default=RATE)\n"
        "@dataclasses.dataclass(frozen=True)\nclass More(Fields):\n    c: Optional[str] = None\n"
        "if nn:\n    class Chosen(Base):\n        def __init__(self, a: int = 1): ...\n"
        "else:\n    class Chosen(Base):\n        def __init__(self, b: int = 1): ...\n"
        "class Outer:\n    class Inner(Base):\n        def __init__(self, a: int = 1): ...\n"
        "def make(a: int = 1) -> Base: ...\n",
        "inner.py",
    )
    written(folder / "own", "def __getattr__(name): ...\n", "dynamic.py")


@pytest.mark.parametrize(
    ("path", "accepted", "refused"),
    [
        ("own.Hidden", "width depth", "lr"),
        ("own.Public", "width depth", "lr"),
        ("own.inner.Base", "lr network", "width"),
        ("own.inner.Alias", "lr network", "width"),
        ("own.inner.Passing", "extra network gamma", "lr width"),
        ("own.inner.Using", "anything", ""),
        ("own.inner.Ignoring", "a", "lr"),
        ("own.inner.Over", "a", "lr"),
        ("own.inner.Under", "anything", ""),
        ("own.inner.Wrapped", "a anything", ""),
        ("own.inner.Made", "a anything", ""),
        ("own.inner.Decorated", "anything", ""),
        ("own.inner.Keeping", "a depth", "width lr"),
        ("own.inner.Fields", "a b", "lr"),
        ("own.inner.More", "a b c", "lr"),
        ("own.inner.Chosen", "anything", ""),
        ("own.inner.Outer.Inner", "a", "lr"),
        ("own.inner.Unknown", "anything", ""),
        ("own.inner.make", "a", "lr"),
        ("own.dynamic.Anything", "anything", ""),
        ("own.Outer.other.Anything", "anything", ""),
    ],
)
def test_arguments_of_a_class_from_its_source(path: str, accepted: str, refused: str, tmp_path: Path) -> None:
    write_user_module(tmp_path)
    sources = SourceIndex([tmp_path])
    try:
        found = signature(sources, sources.find(path))
    except Undecidable:
        assert (accepted, refused) == ("anything", "")
        return
    assert all(name in found.arguments or not found.closed for name in accepted.split())
    assert not any(name in found.arguments or not found.closed for name in refused.split())


def test_errors_about_a_user_module(tmp_path: Path) -> None:
    write_user_module(tmp_path)
    assert said([*DIGITS, "--model", "own.inner.NotThere"], tmp_path).startswith("model: own.inner.NotThere does not exist")
    assert said([*DIGITS, "--model", "own.nothing.X"], tmp_path).startswith(
        "model: own.nothing.X does not exist (No module named 'own.nothing')"
    )
    assert "did you mean 'own.inner.Passing'" in said([*DIGITS, "--model", "own.inner.Pasing"], tmp_path)
    assert said([*DIGITS, "--model", "own.inner.Passing", "--model.extra", "x"], tmp_path) == (
        "model.extra: 'x' is not valid: expected int."
    )
    network = ["--model.network", "own.inner.Hidden"]
    assert said([*DIGITS, *network], tmp_path) == "model.network.depth: must be set; own.inner.Hidden requires it."
    assert said([*DIGITS, *network, "--model.network.depth=1", "--model.network.width=x"], tmp_path) == (
        "model.network.width: 'x' is not valid: expected int or null."
    )
    # The parser knows a class name without its module if that module is imported; a user module may import any.
    assert said([*DIGITS, "--model", "own.inner.Passing", "--trainer.callbacks+=Mine"], tmp_path) == ""


def test_a_warning_about_a_user_module_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "escapes.py").write_text(
        "from lightning import LightningModule\nPATTERN = '\\d'\nclass Net(LightningModule): 0\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert said([*DIGITS, "--model", "escapes.Net"], tmp_path) == ""


def test_nothing_is_imported(tmp_path: Path) -> None:
    write_user_module(tmp_path)
    code = (
        "import sys; from pathlib import Path; from lockstep.core import UsageError\n"
        "from lockstep.config.validation import validate_arguments as check\n"
        f"digits, own = {list(DIGITS)!r}, ['--model', 'own.inner.Passing', '--model.network', 'own.Public']\n"
        f"check([*digits, *own, '--model.network.depth=1', '--trainer.callbacks+=Timer'], folders=[Path({str(tmp_path)!r})])\n"
        "try:\n    check([*digits, '--model.criterion', 'torch.nn.Nothing'])\n"
        "except UsageError as error:\n    print(error.message)\n"
        "print([name for name in ('torch', 'lightning', 'jsonargparse', 'numpy', 'own') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.splitlines()[1:] == ["[]"], run.stderr
    assert run.stdout.startswith("model.criterion: torch.nn.Nothing does not exist")


@pytest.mark.parametrize("module", [lightning.pytorch.callbacks, lightning.pytorch.loggers, torch.nn.modules])
def test_arguments_are_those_of_jsonargparse(module: Any) -> None:
    sources, certain = SourceIndex(), 0
    for name in module.__all__:
        cls = getattr(module, name)
        try:
            found = signature(sources, sources.find(f"{module.__name__}.{name}"))
        except Undecidable:
            continue
        if found.closed and isinstance(cls, type):
            parser = jsonargparse.ArgumentParser()
            parser.add_class_arguments(cls, "x", fail_untyped=False)
            names = {action.dest[2:] for action in parser._actions if re.fullmatch(r"x\.\w+", action.dest)}
            assert names <= set(found.arguments), name
            certain += 1
    assert certain > len(module.__all__) / 2


def test_a_module_that_has_changed_is_read_again(tmp_path: Path) -> None:
    for name, other in (("width", "depth"), ("depth", "width")):
        text = "from torch import nn\n\nclass Own(nn.Module):\n    def __init__(self, {}: int = 1) -> None: ...\n"
        written(tmp_path, text.format(name), "changing.py")
        arguments = [*DIGITS, "--model.network", "changing.Own"]
        assert said([*arguments, f"--model.network.{name}", "2"], tmp_path) == ""
        assert f"model.network.{other}" in said([*arguments, f"--model.network.{other}", "2"], tmp_path)
