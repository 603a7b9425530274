"""Static validation of config files: files in files, sections, and one sentence for each mistake, as the parser decides."""

from pathlib import Path

import pytest
from support.configs import DIGITS, parses, said, written

from lockstep.config.validation.validate import validate_arguments
from lockstep.core.errors import UsageError
from lockstep.trainer.config_parser import parse_config


def test_a_file_with_sections_keeps_its_strings(tmp_path: Path) -> None:
    path = written(
        tmp_path, "run: {name: '12e4567'}\nfit: {wandb: {notes: 2024-01-01, group: '1e3'}}\ntest: {run: {name: other}}\n"
    )
    arguments = ["fit", *DIGITS, "--config", path]
    config, (_, parsed) = validate_arguments(arguments), parse_config(arguments[1:])
    assert [config["run"]["name"], config["wandb"]["notes"], config["wandb"]["group"]] == ["12e4567", "2024-01-01", "1e3"]
    assert [parsed.run.name, parsed.wandb.notes, parsed.wandb.group] == ["12e4567", "2024-01-01", "1e3"]


NO_KEY_IN_FILE = [
    ("trainr: {max_epochs: 1}", "trainr (value {'max_epochs': 1}): unknown key; did you mean 'trainer"),
    ("trainer: {max_epoch: 1}", "trainer.max_epoch (value 1): unknown key; did you mean 'trainer.max_epochs'"),
    ("trainer.max_epoch: 1", "trainer.max_epoch"),
    ("trainer: {strategy: ddp}", "trainer.strategy (value ddp): cannot be set in a config; set strategy (ddp or deepspeed)"),
    ("run: {name: 5}", "run.name: '5' is not valid: expected str."),
    ("run: {root: 5}", "run.root"),
    ("model: 5", "model: '5' is not valid: expected"),
    ("model: null", "model"),
    ("model: {init_args: }", "model"),
    ("model: {init_args: {lr: [1, 2]}}", "model.lr: '[1, 2]' is not valid: expected float."),
    ("model: {init_args: {network: {init_args: {width: [8]}}}}", "model.network.width (value [8]): unknown argument of"),
    ("trainer: {callbacks: [{class_path: Timer, init_args: {durtion: 1}}]}", "trainer.callbacks.durtion"),
    ("trainer: [", "is not valid YAML"),
    ("", "expected a mapping, got null."),
    ("5", "expected a mapping, got 5."),
    ("1: 2", "1"),
]


NO_MAPPING = [  # only static validation refuses these
    ("trainer:\nrun: {name: a}", "trainer: expected a mapping, got null."),
    ("run: 5", "run: expected a mapping, got 5."),
]


@pytest.mark.parametrize(("text", "message"), NO_KEY_IN_FILE + NO_MAPPING)
def test_message_of_a_mistake_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    assert message in said([*DIGITS, "--config", written(tmp_path, text)])


GOOD_FILES = [
    "trainer.max_epochs: 3\nmodel.lr: 3\n$schema: x\nmodel: {init_args.lr: 3, init_args: {network.widths: [8]}}\n",
    "trainer: {callbacks+: [Timer, {class_path: EarlyStopping, init_args: {monitor: x}}], max_epochs: null}\n",
    "trainer: {max_time: {days: 1}, logger: [{class_path: CSVLogger, init_args: {save_dir: x}}]}\n",
    "model: lockstep.models.Classifier\ndata: {batch_size: 3, seed: 4}\nwandb: {tags: '[a]', notes: null}\n",
    "model: {init_args: {lr: 1e-3, weight_decay: '5', optimizer: null, network: {init_args: {widths: [8, 8]}}}}\n",
    "model: {class_path: lockstep.models.Classifier}\nrun: {root: null}\ntrainer: {}\n",
]


@pytest.mark.parametrize("text", GOOD_FILES)
def test_a_file_that_the_parser_accepts_passes(text: str, tmp_path: Path) -> None:
    arguments = [*DIGITS, "--config", written(tmp_path, text)]
    assert parses(arguments)
    assert said(arguments) == ""


def test_files_in_files_pass(tmp_path: Path) -> None:
    written(tmp_path, "max_epochs: 3\n", "trainer.yaml")
    written(tmp_path, "class_path: torch.nn.CrossEntropyLoss\ninit_args: {label_smoothing: 0.1}\n", "criterion.yaml")
    model = "class_path: lockstep.models.Classifier\ninit_args: {lr: 3, criterion: criterion.yaml}\n"
    inner = written(tmp_path, model, "model.yaml")
    outer = written(tmp_path, "config: mine.yaml\n", "outer.yaml")
    written(tmp_path, "trainer: trainer.yaml\nmodel: model.yaml\n")
    for arguments in (["--config", outer], ["--model", inner, "--run", "{name: x}"]):
        assert parses([*DIGITS, *arguments])
        assert said([*DIGITS, *arguments]) == ""
    assert validate_arguments([*DIGITS, "--config", outer])["trainer"]["max_epochs"] == 3


def test_a_hidden_file_is_not_proposed_as_a_config(tmp_path: Path) -> None:
    (tmp_path / ".tools.yaml").touch()
    assert ".tools" not in said(["--config", str(tmp_path / "tools.yaml")])


def test_a_file_that_includes_itself_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "config: mine.yaml\n", "outer.yaml")
    assert "includes itself" in said(["--config", written(tmp_path, "config: outer.yaml\n")])


@pytest.mark.parametrize("text", [text for text, _ in NO_KEY_IN_FILE])
def test_the_parser_refuses_a_file_that_validation_refuses(text: str, tmp_path: Path) -> None:
    assert not parses([*DIGITS, "--config", written(tmp_path, text)])


@pytest.mark.parametrize("text", [text for text, _ in NO_MAPPING])
def test_the_run_refuses_a_group_that_is_not_a_mapping(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a mapping"):
        parse_config([*DIGITS, "--config", written(tmp_path, text)])
