"""Errors in the user's own code: their type, file and line; wrong keys name the class that does not have them."""

import sys
from pathlib import Path

import pytest
from support.configs import said, written

from lockstep.core.errors import UsageError
from lockstep.trainer.config_parser import parse_config

DATA = ("--data", "lockstep.data.Digits")
BROKEN = {
    "wrong_syntax.py": "from lightning.pytorch import LightningModule\nclass Model(LightningModule)\n    pass\n",
    "lacks_package.py": "import torch\nimport not_installed.inner\nclass Model: pass\n",
    "lacks_name.py": "import torch\nfrom lightning.pytorch import LightningModule, NoSuchName\n"
    "class Model(LightningModule): pass\n",
    "raises.py": "import torch\nfrom lightning.pytorch import LightningModule\nraise RuntimeError('set MY_VARIABLE')\n"
    "class Model(LightningModule): pass\n",
    "indirect.py": "from lightning.pytorch import LightningModule\nimport lacks_package\nclass Model(LightningModule): pass\n",
}
OPTIONAL = """
try:
    import not_installed
except ImportError:
    not_installed = None
from lightning.pytorch import LightningModule

class Model(LightningModule):
    class Inner(LightningModule):
        pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of broken modules that can be imported."""
    for name, text in BROKEN.items():
        written(tmp_path, text, name)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def parser_said(*arguments: str) -> str:
    with pytest.raises(UsageError) as raised:
        parse_config([*DATA, *arguments])
    return raised.value.message


@pytest.mark.parametrize(
    ("path", "error", "place", "is_static"),
    [
        ("wrong_syntax.Model", "SyntaxError: expected ':'", "wrong_syntax.py, line 2", True),
        ("lacks_package.Model", "ModuleNotFoundError: No module named 'not_installed'", "lacks_package.py, line 2", True),
        ("lacks_name.Model", "ImportError: cannot import name 'NoSuchName'", "lacks_name.py, line 2", False),
        ("raises.Model", "RuntimeError: set MY_VARIABLE", "raises.py, line 3", False),
        ("indirect.Model", "ModuleNotFoundError: No module named 'not_installed'", "lacks_package.py, line 2", False),
    ],
)
@pytest.mark.parametrize("key", ["model", "trainer.callbacks"])
def test_an_error_in_a_module_is_shown_with_its_place(
    folder: Path, key: str, path: str, error: str, place: str, is_static: bool
) -> None:
    flags = [f"--{key}={path}"] if key == "model" else ["--model=lockstep.models.Classifier", f"--{key}+={path}"]
    message = parser_said(*flags)
    assert message.startswith(f"{key}: {path} cannot be imported: {error}")
    assert f"({folder / place})" in message
    assert (said([*DATA, *flags], folder) == message) or not is_static


def test_an_optional_package_and_a_nested_class_are_no_error(folder: Path) -> None:
    written(folder, OPTIONAL, "has_optional.py")
    arguments = [*DATA, "--model=has_optional.Model.Inner"]
    assert said(arguments, folder) == ""
    assert parse_config(arguments)[1].model.class_path == "has_optional.Model.Inner"


OWNERS = """
from dataclasses import dataclass
from typing import Callable, TypedDict

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from pydantic import BaseModel
from torch import nn

class Shape(BaseModel):
    width: int = 3

class Options(TypedDict, total=False):
    width: int

@dataclass
class Size:
    width: PositiveInt = 1

class Net(nn.Module):
    def __init__(self, hidden: int = 1):
        super().__init__()
    @classmethod
    def small(cls, depth: int = 1) -> "Net":
        return cls()

class Model(LightningModule):
    def __init__(self, shape: Shape = Shape(), options: Options = {}, size: Size = Size(), net: nn.Module | None = None,
                 optimizer: OptimizerCallable = torch.optim.Adam):
        super().__init__()
    @classmethod
    def build(cls, depth: int = 1) -> "Model":
        return cls()
"""


@pytest.mark.parametrize(
    ("arguments", "owner", "near"),
    [
        (["--model.shape.widht=1"], "Shape", "model.shape.width"),
        (["--model.shape", '{"widht": 1}'], "Shape", "model.shape.width"),
        (["--model.options.widht=1"], "Options", "model.options.width"),
        (["--model.size.widht=1"], "Size", "model.size.width"),
        (["--model.net=owners.Net.small", "--model.net.dpth=1"], "Net.small", "model.net.depth"),
        (["--model=owners.Model.build", "--model.dpth=1"], "Model.build", "model.depth"),
        (["--model.optimizer=torch.optim.SGD", "--model.optimizer.momentm=1"], "SGD", "model.optimizer.momentum"),
        (["--model.optimizer.beta=1"], "Adam", "model.optimizer.betas"),
    ],
)
def test_a_wrong_key_names_the_class_that_lacks_it(folder: Path, arguments: list[str], owner: str, near: str) -> None:
    written(folder, OWNERS, "owners.py")
    path = f"torch.optim.{owner}" if near.startswith("model.optimizer") else f"owners.{owner}"
    message = parser_said("--model=owners.Model", *arguments)
    assert f": unknown argument of {path}; did you mean '{near}'" in message
    assert "own.Model;" not in message
