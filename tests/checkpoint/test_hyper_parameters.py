"""Lightning's ``load_from_checkpoint`` makes the module and the DataModule of a run again, without arguments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from support.toy_model import ToyData
from torch import nn

from lockstep.checkpoint.hyper_parameters import HyperParameters
from lockstep.checkpoint.serialization import to_plain_types
from lockstep.config.yaml_files import load_yaml
from lockstep.trainer.config_parser import instantiate, make_parser
from lockstep.trainer.saved_config import dump_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning calls what jsonargparse has renamed
    pytest.mark.filterwarnings("ignore:Attribute 'layer' is an instance of `nn.Module`"),
]


class Net(LightningModule):
    """Takes an object, and values that a checkpoint holds in another form."""

    def __init__(self, layer: nn.Module, sizes: tuple[int, ...] = (1,), path: Path = Path("a"), rate: float = 0.1) -> None:
        super().__init__()
        self.layer, self.sizes, self.path, self.rate = layer, sizes, path, rate


class Wider(Net):
    """Passes arguments on."""

    def __init__(self, width: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.width = width


class Saves(Net):
    """Saves its arguments as Lightning's documentation shows, and changes one."""

    def __init__(self, layer: nn.Module, sizes: tuple[int, ...] = (1,), rate: float = 0.1) -> None:
        super().__init__(layer, sizes, rate=rate)
        self.save_hyperparameters()
        self.hparams["rate"] = 0.7
        self.save_hyperparameters({"note": "kept"})


class Outer:
    """Has a module in it."""

    class Inner(Net):
        """Lightning does not import it by its path."""


def make_net(seed: int) -> Net:
    """Make a module of values that are not its arguments."""
    return Net(nn.Linear(3, seed))


LAYER = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 4}}
GIVEN = {"layer": LAYER, "sizes": [5, 6], "rate": 0.5}


def saved(section: dict[str, Any], folder: Path) -> tuple[LightningModule, Path]:
    """The module that a config describes, and a checkpoint of it."""
    parser = make_parser()
    config = parser.parse_object({"model": section, "data": {"class_path": "support.toy_model.ToyData"}})
    module = instantiate(parser, config).model
    callbacks: list[Callback] = [HyperParameters(load_yaml(dump_config(parser, config)))]
    trainer = Trainer(logger=False, callbacks=callbacks, enable_checkpointing=False, accelerator="cpu", default_root_dir=folder)
    trainer.strategy.connect(module)
    trainer.datamodule = ToyData()  # type: ignore[attr-defined]
    trainer.save_checkpoint(folder / "model.ckpt")
    return module, folder / "model.ckpt"


@pytest.mark.parametrize("name", ["Net", "Wider", "Saves", "Outer.Inner"])
def test_a_module_with_objects_loads_without_arguments(name: str, tmp_path: Path) -> None:
    module, path = saved({"class_path": f"{__name__}.{name}", "init_args": GIVEN}, tmp_path)
    loaded = type(module).load_from_checkpoint(path)
    assert isinstance(loaded, Net) and isinstance(module, Net)
    assert torch.equal(loaded.layer.weight, module.layer.weight)  # type: ignore[arg-type]
    assert (loaded.sizes, loaded.path) == ((5, 6), Path("a"))
    assert loaded.rate == (0.7 if name == "Saves" else 0.5)  # what a class has saved itself is what it gets
    assert type(module).load_from_checkpoint(path, rate=0.2).rate == 0.2


def test_the_base_class_loads_the_class_of_the_run(tmp_path: Path) -> None:
    _, path = saved({"class_path": f"{__name__}.Wider", "init_args": {**GIVEN, "width": 7}}, tmp_path)
    loaded = LightningModule.load_from_checkpoint(path)
    assert isinstance(loaded, Wider) and (loaded.width, loaded.sizes) == (7, (5, 6))


def test_a_checkpoint_keeps_what_a_class_has_saved(tmp_path: Path) -> None:
    _, path = saved({"class_path": f"{__name__}.Saves", "init_args": GIVEN}, tmp_path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["note"] == "kept"
    _, path = saved({"class_path": f"{__name__}.make_net", "init_args": {"seed": 4}}, tmp_path)
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {}


def test_numbers_of_numpy_are_stored_as_plain_numbers() -> None:
    saved = to_plain_types({"rate": np.float64(0.5), "half": np.float32(0.5), "sizes": [np.int64(3)], "name": np.str_("a")})
    assert saved == {"rate": 0.5, "half": 0.5, "sizes": [3], "name": "a"}
    assert [type(value) for value in (*saved.values(), saved["sizes"][0])] == [float, float, list, str, int]


def test_a_data_module_loads_too(tmp_path: Path) -> None:
    _, path = saved({"class_path": f"{__name__}.Net", "init_args": GIVEN}, tmp_path)
    assert isinstance(ToyData.load_from_checkpoint(path), ToyData)
