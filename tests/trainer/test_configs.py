"""Every checked-in config parses and trains, flags override files, keys and classes have help. In-process, then short runs."""

import re
from pathlib import Path

import pytest
import yaml
from support.runs import REPO, Launch

from lockstep.config import with_config
from lockstep.config.validation import validate_arguments
from lockstep.core import CommandLineParser
from lockstep.core.errors import UsageError
from lockstep.data.base import ImageData
from lockstep.trainer.config_parser import parse_config

ADDITIONS = sorted((REPO / "configs").glob("deepspeed_*.yaml"))
CONFIGS = sorted(set((REPO / "configs").glob("*.yaml")) - set(ADDITIONS))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_names_itself(path: Path) -> None:
    _, config = parse_config(["--config", str(path)])
    assert config.run.name == path.stem
    assert path.read_text().startswith("# "), "a config says first what it trains and how"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_two_steps(path: Path, launch: Launch, tmp_path: Path) -> None:
    """With its own model and schedule, on a few small random images instead of its data."""
    config = yaml.safe_load(path.read_text())
    shape = {"digits": [1, 8, 8], "mnist": [1, 28, 28]}.get(path.stem, [3, 64, 64])
    samples = {"train_samples": 4, "val_samples": 4, "test_samples": 4}
    arguments = {"shape": shape, "classes": config["model"]["init_args"]["num_classes"], "batch_size": 2, **samples}
    config["data"] = {"class_path": "lockstep.data.Synthetic", "init_args": arguments}
    if path.stem == "vit_6b":  # too large for a test machine
        small = {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
        config["model"]["init_args"]["network"]["init_args"] |= small
    config["trainer"] |= {"max_steps": 2, "max_epochs": 1, "log_every_n_steps": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    run = launch("--config", str(tmp_path / "small.yaml"))
    assert (run.status, run.result["global_step"]) == (0, 2)


@pytest.mark.parametrize("path", ADDITIONS, ids=lambda path: path.stem)
def test_every_addition_goes_with_every_config(path: Path, launch: Launch) -> None:
    for experiment in CONFIGS:
        _, config = parse_config(["--config", str(experiment), "--config", str(path)])
        assert (config.run.name, config.strategy) == (experiment.stem, "deepspeed")
    run = launch(
        "--config",
        str(REPO / "configs/digits.yaml"),
        "--config",
        str(path),
        "--trainer.max_steps",
        "2",
        "--run.test_after_fit",
        "false",
    )
    assert (run.status, run.result["global_step"]) == (0, 2)


def test_flags_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("trainer: {max_epochs: 7, accumulate_grad_batches: 2}\nmodel: {init_args: {lr: 0.5}}\n")
    files = ["--config", str(REPO / "configs/digits.yaml"), "--config", str(later)]
    _, config = parse_config([*files, "--trainer.max_epochs", "9"])
    assert (config.trainer.max_epochs, config.trainer.accumulate_grad_batches, config.model.init_args.lr) == (9, 2, 0.5)


def test_the_home_folder_is_the_same_before_and_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = {"run.root": "~/runs", "ckpt_path": "~/x", "deepspeed.nvme_path": "~/nvme", "deepspeed.config": "~/zero.json"}
    data = {"class_path": "lockstep.data.Shards", "init_args": {"root": "~/data", "copy_to": "~/copy", "archive": "~/a.tar"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(keys | {"data": data, "wandb.notes": "~/kept"}))
    arguments = with_config(["--config", "digits", "--config=~/mine.yaml"])
    static, (_, parsed) = validate_arguments(arguments), parse_config(arguments)
    for config in (static, parsed):
        paths = [config["run"]["root"], config["deepspeed"]["nvme_path"], config["deepspeed"]["config"]]
        paths += [config["data"]["init_args"][name] for name in ("root", "copy_to", "archive")]
        names = ["runs", "nvme", "zero.json", "data", "copy", "a.tar"]
        assert [str(path) for path in paths] == [f"{tmp_path}/{name}" for name in names]
        assert (config["ckpt_path"], config["wandb"]["notes"]) == (f"{tmp_path}/x", "~/kept")
    flags = CommandLineParser()
    flags.add_argument_group("one").add_argument("--resume", type=Path)
    assert flags.parse_args(["--resume=~/runs/x"]).resume == tmp_path / "runs/x"


def test_the_seed_reaches_the_split() -> None:
    parser, config = parse_config(["--config", str(REPO / "configs/digits.yaml"), "--seed_everything", "5"])
    data = parser.instantiate(config).data
    assert isinstance(data, ImageData)
    assert data.seed == 5


def test_print_config(launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("--print_config").status == 0
    config = yaml.safe_load(capfd.readouterr().out)
    assert config["model"]["init_args"]["num_classes"] == 10
    assert config["ddp"]["gradient_as_bucket_view"] is True


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--trainer.help"], "--trainer.max_epochs"),
        (["--checkpoint.help"], "--checkpoint.every_n_steps EVERY_N_STEPS"),
        (["--model.help"], "lockstep.models.Classifier\n\nTrains any network"),
        (["--model.network.help"], "--model.network.widths"),
        (["--data.help", "MNIST"], "--data.root ROOT"),
        (["--optimizer.help", "torch.optim.SGD"], "--optimizer.momentum"),
    ],
)
def test_help_of_a_section_and_of_a_class(arguments: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config(with_config(arguments))
    text = capsys.readouterr().out
    assert end.value.code == 0 and shown in text
    assert "known subclasses" not in text and len(text.splitlines()) < 300


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--modle.help"], "modle.help: unknown key; did you mean 'model.help'?"),
        (["--model.help", "Clasifier"], "cannot be imported (No module named 'Clasifier'); did you mean 'lockstep.models.Clas"),
        (["--model.help", "torch.nn"], "model.help: torch.nn cannot be imported (it is neither a class nor a function); valid"),
        (["--optimizer.help"], "optimizer.help: no class is set; give one: --optimizer.help CLASS."),
    ],
)
def test_help_of_what_does_not_exist(arguments: list[str], error: str) -> None:
    with pytest.raises(UsageError, match=re.escape(error)):
        parse_config(with_config(arguments))
