"""The saved config parses to the config that was trained: what is written, what is refused, then runs that resume."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.faults import fault
from support.runs import SMALL, Launch, assert_same_run, resume_run
from support.toy_model import ToyModel
from support.wandb_reader import read_records
from torch import nn

from lockstep.config import load_yaml
from lockstep.core import UsageError
from lockstep.trainer.config_parser import make_parser, parse_config
from lockstep.trainer.saved_config import dump_config

TOY = (
    "--data=support.toy_model.ToyData",
    "--data.samples=96",
    "--data.workers=0",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
)


class Colour(Enum):
    RED = 1


class Untyped(ToyModel):
    """Objects as defaults, without annotations."""

    def __init__(  # type: ignore[no-untyped-def]
        self,
        device=torch.device("cpu"),  # noqa: B008
        norm_layer=nn.LayerNorm,
        act=functools.partial(nn.GELU, approximate="tanh"),  # noqa: B008
        function=lambda x: x,
        layer=nn.ReLU(),  # noqa: B008
        pair=(1, 2),
        root=Path("data"),
        tensor=torch.ones(2),  # noqa: B008
        name="1e5",
    ) -> None:
        super().__init__()
        assert isinstance(device, torch.device) and isinstance(norm_layer, type) and isinstance(act, functools.partial)
        assert isinstance(layer, nn.Module) and isinstance(pair, tuple) and isinstance(root, Path) and name == "1e5"


@dataclass
class Place:
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    steps: int = 1


class Typed(ToyModel):
    """Annotated arguments whose values are objects."""

    def __init__(
        self,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        dtype: torch.dtype = torch.float32,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        make: Callable[..., nn.Module] = nn.LayerNorm,
        limit: timedelta = timedelta(hours=1),
        colour: Colour | None = None,
        place: Place = Place(),  # noqa: B008
        pair: tuple[int, int] = (1, 2),
        root: Path = Path("data"),
    ) -> None:
        super().__init__()
        assert isinstance(device, torch.device) and isinstance(dtype, torch.dtype) and isinstance(limit, timedelta)


class Stubborn:
    """A type that a text makes, and whose text is another one."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return "something else"


class Strange(ToyModel):
    def __init__(self, value: Stubborn) -> None:
        super().__init__()


def saved(*arguments: str) -> dict[str, Any]:
    """The content of config.yaml."""
    parser, config = parse_config([*TOY, *arguments])
    content: dict[str, Any] = load_yaml(dump_config(parser, config))
    return content


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--model=Untyped"], {}),
        (["--model=Untyped", "--model.pair=[3, 4]"], {"pair": [3, 4]}),
        (["--model=Typed", "--model.device=meta"], {"device": "meta", "colour": None, "root": "data"}),
        (["--model=Typed", "--model.dtype=torch.float16"], {"dtype": "torch.float16", "colour": None, "root": "data"}),
        (["--model=Typed", "--model.limit=2:00:00"], {"limit": "2:00:00", "colour": None, "root": "data"}),
        (["--model=Typed", "--model.colour=RED", "--model.root=x"], {"colour": "RED", "root": "x"}),
        (["--model=Typed", "--model.norm_layer=torch.nn.BatchNorm1d"], {"norm_layer": "torch.nn.BatchNorm1d", "root": "data"}),
        (
            ["--model=Typed", "--model.place.steps=3", "--model.pair=[5, 6]"],
            {"pair": [5, 6], "place": {"device": "cpu", "steps": 3}},
        ),
    ],
)
def test_what_is_not_a_default_is_saved(arguments: list[str], kept: dict[str, Any]) -> None:
    content = saved(*(argument.replace("--model=", f"--model={__name__}.") for argument in arguments))
    written = content["model"]["init_args"]
    assert {name: written[name] for name in kept} == kept
    assert set(written) - set(kept) <= {"make", "colour", "root"}
    assert "Unable" not in str(content)


def test_arguments_of_callbacks_are_saved_as_they_were_given() -> None:
    callbacks = ["ModelPruning", "pruning_fn=l1_unstructured", "Timer", "duration=00:01:00:00", "Timer", "interval=epoch"]
    flags = [f"--trainer.callbacks.{item}" if "=" in item else f"--trainer.callbacks+={item}" for item in callbacks]
    pruning, timer, other = saved(f"--model={__name__}.Typed", *flags)["trainer"]["callbacks"]
    assert pruning["init_args"]["pruning_fn"] == "l1_unstructured"
    assert timer["init_args"] == {"duration": "00:01:00:00", "verbose": True}
    assert other["init_args"] == {"duration": None, "interval": "epoch", "verbose": True}


def test_a_value_that_reads_back_as_another_one_is_refused() -> None:
    from jsonargparse.typing import register_type

    register_type(Stubborn)
    with pytest.raises(UsageError, match=r"^model\.value: this value cannot be saved in config\.yaml"):
        saved(f"--model={__name__}.Strange", "--model.value=x")


def test_print_config_shows_what_is_saved(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config([*TOY, f"--model={__name__}.Untyped", "--print_config"])
    assert ended.value.code == 0
    parser = make_parser()
    assert load_yaml(capsys.readouterr().out) == saved(f"--model={__name__}.Untyped")
    assert parser.parse_args([*TOY, f"--model={__name__}.Untyped"]).model.init_args.pair == (1, 2)


class Ends(Callback):
    """Has an object as default, which the callback needs."""

    def __init__(self, device=torch.device("cpu")) -> None:  # type: ignore[no-untyped-def]  # noqa: B008
        assert isinstance(device, torch.device)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        assert trainer.global_step == 16


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model=Untyped", "--trainer.callbacks+=Ends"],
        ["--model=Typed", "--model.limit=2:00:00"],
        ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01"],
        ["--trainer.callbacks+=ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured"],
        ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00"],
    ],
)
def test_a_run_resumes_from_its_folder_alone(
    arguments: list[str], launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("=Untyped", f"={__name__}.Untyped") for argument in arguments]
    given = [argument.replace("=Typed", f"={__name__}.Typed").replace("=Ends", f"={__name__}.Ends") for argument in given]
    model = [] if "--model=" in arguments[0] else ["--model=support.toy_model.ToyModel"]
    toy = [*TOY, *model, *given, "--checkpoint.every_n_steps=2", "--config", str(tmp_path / "empty.yaml")]
    (tmp_path / "empty.yaml").write_text("run: {name: toy}\n")
    whole = launch(*toy)
    assert whole.status == 0, capfd.readouterr().err
    broken = launch(*toy, *fault(tmp_path / "fault", "raise", step=9))
    assert broken.status == 1
    resumed = resume_run(launch, broken)
    assert resumed.status == 0, capfd.readouterr().err
    assert_same_run(resumed, whole)


def test_a_resumed_run_keeps_its_config_and_result_until_it_trains(launch: Launch, tmp_path: Path) -> None:
    run = launch("--ranks", "2", *SMALL, "--trainer.max_epochs", "1")
    config, result = run.folder / "config.yaml", run.folder / "result.json"
    before = config.read_text(), result.read_text()
    longer = ("--trainer.max_epochs", "2")
    for wrong in (
        (*longer, "--model.network", "lockstep.models.MLP", "--model.network.hidden", "[8]"),
        (*longer, *fault(tmp_path / "1", "SIGKILL", hook="on_train_start", rank=0)),
        (*longer, *fault(tmp_path / "2", "raise", hook="on_train_start", rank=1)),
        ("--ranks", "1", *longer, *fault(tmp_path / "3", "raise", hook="on_train_start")),
    ):
        assert resume_run(launch, run, *wrong).status != 0
        assert (config.read_text(), result.read_text()) == before
        assert json.loads((run.folder / "status.json").read_text())["status"] == "finished"
    offline = ("--wandb.mode", "offline")
    assert resume_run(launch, run, *longer, *offline, *fault(tmp_path / "4", "SIGTERM", step=25)).status == 143
    shown = re.findall(r'"max_epochs": (\d)', str(read_records(run.folder)).replace("'", '"'))
    assert list(dict.fromkeys(shown)) == ["1", "2"]  # W&B shows a config once the run trains with it
    assert load_yaml(config.read_text())["trainer"]["max_epochs"] == 2 and run.result["status"] == "interrupted"
    assert (run.folder / "logs" / "1" / "result.json").read_text() == before[1]
    assert resume_run(launch, run, "--wandb.mode", "disabled").status == 0
    assert run.result["global_step"] == 40
