"""Static validation: one sentence for each mistake, and nothing valid is refused.

What passes, the message of each mistake, and that jsonargparse agrees on both.
"""

import re
import shlex
from pathlib import Path

import pytest
from support.configs import DIGITS, parses, said, written
from support.runs import REPO

from lockstep.config.validation.lookup import SourceIndex
from lockstep.config.validation.validate import ConfigValidator, validate_arguments, validate_sweep
from lockstep.core.errors import UsageError
from lockstep.trainer.config_parser import make_parser, parse_config


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_passes(path: Path) -> None:
    is_addition = path.stem.startswith("deepspeed_")
    config = validate_arguments([*(DIGITS if is_addition else ()), "--config", str(path)])
    assert config["run"]["name"] == ("digits" if is_addition else path.stem)
    assert config["model"]["class_path"] == "lockstep.models.Classifier"
    assert config["strategy"] == ("deepspeed" if is_addition or path.stem == "vit_6b" else "ddp")


@pytest.mark.parametrize(
    "line", ["--help", "-h", "--print_config", "--model.help lockstep.models.Classifier", "--run.test_after_fit no -h"]
)
def test_help_passes(line: str) -> None:
    assert said(line.split()) == ""


def test_defaults_files_and_flags_are_merged_in_their_order(tmp_path: Path) -> None:
    config = validate_arguments(list(DIGITS))
    usual = {"test_after_fit": True, "hang_timeout_seconds": 300.0, "max_restarts": 100, "warm_restarts": True}
    assert config["run"] == {"name": "digits", "root": Path("runs"), **usual}
    assert (config["wandb"]["group"], config["shared_filesystem"]) == (None, True)
    later = written(
        tmp_path, "trainer: {max_epochs: 7, accumulate_grad_batches: 2}\nmodel: {init_args: {lr: 5e-1}}\nrun.name: a\n"
    )
    flags = ["--trainer.max_epochs", "9", "--run.root=/x", "--shared_filesystem", "no", "--wandb.group", "7"]
    config = validate_arguments(["fit", *DIGITS, "--config", later, *flags])
    assert config["trainer"] == {"max_epochs": 9, "log_every_n_steps": 10, "accumulate_grad_batches": 2}
    assert config["model"]["init_args"]["lr"] == 0.5
    assert config["run"] == {"name": "a", "root": Path("/x"), **usual}
    assert (config["wandb"]["group"], config["shared_filesystem"]) == ("7", False)
    assert validate_arguments(["--trainer.max_epochs", "9", *DIGITS])["trainer"]["max_epochs"] == 20


def test_a_new_class_keeps_the_arguments_that_it_accepts() -> None:
    network = ["--model.network", "lockstep.models.MLP", "--model.network.hidden", "[1]", "--model.network.num_classes=5"]
    config = validate_arguments([*DIGITS, *network])
    assert config["model"]["init_args"]["network"] == {
        "class_path": "lockstep.models.MLP",
        "init_args": {"num_classes": 5, "hidden": [1]},
    }
    callbacks = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9", "--trainer.callbacks+=Timer"]
    assert validate_arguments([*DIGITS, *callbacks])["trainer"]["callbacks"] == [
        {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}},
        {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {}},
    ]


NO_KEY = [  # (arguments after the default config, message); static validation and jsonargparse refuse them
    (["foo"], "'foo' is not a key: keys begin with --; a command (fit, validate, test, predict) must be the first argument."),
    (["--trainer.max_epochs"], "trainer.max_epochs: needs a value: --trainer.max_epochs VALUE."),
    (["--run.name", "--run.test_after_fit", "true"], "run.name: needs a value"),
    (["--trainer.max_epoch", "3"], "trainer.max_epoch (value 3): unknown key; did you mean 'trainer.max_epochs'"),
    (["--ddp.static_grph=1"], "ddp.static_grph (value 1): unknown key; did you mean 'ddp.static_graph'"),
    (["--modle.lr", "1"], "modle.lr (value 1): unknown key; did you mean 'model.lr'?"),
    (["--max_epochs", "1"], "max_epochs (value 1): unknown key; did you mean 'trainer.max_epochs'?"),
    (["--run.name.x", "1"], "run.name"),
    (["--trainer.max_epochs+=1"], "trainer.max_epochs+"),
    (["--trainer.devices", "2"], "trainer.devices (value 2): cannot be set in a config; use the launcher's flag --ranks"),
    (["--trainer.strategy=ddp"], "trainer.strategy (value ddp): cannot be set in a config; set strategy (ddp or deepspeed)"),
    (["--config", "nowhere.yaml"], "config: nowhere.yaml does not exist"),
    (["--config", str(REPO / "configs")], "is a folder, not a file."),
]


WRONG_VALUE = [
    (["--trainer.max_epochs", "ten"], "trainer.max_epochs: 'ten' is not valid: expected int or null."),
    (["--trainer.max_epochs=1.5"], "trainer.max_epochs: '1.5' is not valid: expected int or null."),
    (["--trainer.max_epochs=1e3"], "trainer.max_epochs: '1e3' is not valid: expected int or null."),
    (["--trainer.precision", "bf17"], "trainer.precision: 'bf17' is not valid: expected one of 'auto', '32-true',"),
    (["--trainer.fast_dev_run=x"], "trainer.fast_dev_run: 'x' is not valid: expected int or bool."),
    (["--trainer.deterministic=wran"], "trainer.deterministic: 'wran' is not valid: expected bool or one of 'warn' or null"),
    (["--wandb.mode", "onlin"], "wandb.mode: 'onlin' is not valid: expected one of 'auto', 'online'"),
    (["--wandb.tags", "a"], "wandb.tags: 'a' is not valid: expected list."),
    (["--strategy", "dp"], "strategy: 'dp' is not valid: expected one of 'ddp', 'deepspeed'"),
    (["--run.test_after_fit", "1"], "run.test_after_fit: '1' is not valid: expected bool."),
    (["--run", "5"], "run"),
    (["--seed_everything", "x"], "seed_everything: 'x' is not valid: expected int or bool."),
    (["--model.lr", "fast"], "model.lr: 'fast' is not valid: expected float."),
    (["--model.lr", "[1]"], "model.lr: '[1]' is not valid: expected float."),
    (["--model.schedule", "cosin"], "model.schedule: 'cosin' is not valid: expected one of 'constant', 'cosine', 'step'; did"),
    (["--model.optimizer_args", "0.9"], "model.optimizer_args: '0.9' is not valid: expected dict or null."),
    (["--model.network.widths", "8"], "model.network.widths: '8' is not valid: expected"),
    (["--data.batch_size", "many"], "data.batch_size: 'many' is not valid: expected int or null."),
]


OUT_OF_RANGE = [  # only static validation refuses these
    (
        ["--data", "lockstep.data.ImageFolder", "--data.archive", "http://host/a.tar"],
        "data.archive: http://host/a.tar is not encrypted, so that it can be altered in transit; use https, or set",
    ),
    (["--seed_everything", "-1"], "seed_everything: -1 must be 0 or more"),
    (["--run.hang_timeout_seconds=.nan"], "run.hang_timeout_seconds: nan must be greater than 0."),
    (["--model.lr=.nan"], "model.lr: nan must be greater than 0."),
    (["--checkpoint.save_top_k", "0"], "checkpoint.save_top_k: 0 must be 1 or more."),
]


WRONG_CLASS = [
    (["--model.lrr", "3"], "model.lrr (value 3): unknown argument of lockstep.models.Classifier; did you mean 'model.lr'"),
    (["--model.init_args.lrr=3"], "model.lrr (value 3): unknown argument of lockstep.models.Classifier; did you mean"),
    (["--model.lr.x=3"], "model.lr"),
    (["--data.batch", "3"], "data.batch (value 3): unknown argument of lockstep.data.Digits; did you mean"),
    (
        ["--model.network.width", "[1]"],
        "model.network.width (value [1]): unknown argument of lockstep.models.ConvNet; did",
    ),
    (["--model", "nowhere.Model"], "model: nowhere.Model does not exist (No module named 'nowhere'); run from the folder"),
    (["--model", "lockstep.model.Classifier"], "model: lockstep.model.Classifier does not exist"),
    (
        ["--model", "lockstep.models.Classifer"],
        "model: lockstep.models.Classifer does not exist; did you mean 'lockstep.models",
    ),
    (["--model", "lockstep.models.MLP"], "model: lockstep.models.MLP is not a LightningModule."),
    (["--data", "Mnist"], "data: unknown class 'Mnist'; did you mean 'lockstep.data.MNIST'?"),
    (["--model", "{class_path: lockstep.models.Classifier, lr: 1}"], "model."),
    (
        ["--trainer.callbacks+=EarlyStoping"],
        "trainer.callbacks: unknown class 'EarlyStoping'; did you mean 'EarlyStopping'",
    ),
    (
        ["--trainer.callbacks+=EarlyStopping"],
        "trainer.callbacks.monitor: must be set; lightning.pytorch.callbacks.EarlyStopping",
    ),
    (
        ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.deca=0.9"],
        "trainer.callbacks.deca (value 0.9): unknown argument of lightning.pytorch.callbacks.EMAWeightAveraging; did you",
    ),
    (
        ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=much"],
        "trainer.callbacks.decay: 'much' is not valid: expected float.",
    ),
    (
        ["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitr: x}}]"],
        "trainer.callbacks.monitr",
    ),
    (["--trainer.logger=lightning.pytorch.loggers.CSVLoger"], "trainer.logger: lightning.pytorch.loggers.CSVLoger does not"),
    (["--model.criterion=torch.nn.CrossEntropyLos"], "model.criterion: torch.nn.CrossEntropyLos does not exist"),
    (["--model.criterion.label_smoothing=0.1"], "model.criterion.label_smoothing (value 0.1): "),
    (
        ["--model.network", "lockstep.models.MLP", "--model.network.hiden", "[1]"],
        "model.network.hiden (value [1]): unknown argument of lockstep.models.MLP; did you mean 'model.network.hidden'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), NO_KEY + WRONG_VALUE + OUT_OF_RANGE + WRONG_CLASS)
def test_message_of_a_mistake(arguments: list[str], message: str) -> None:
    assert message in said([*DIGITS, *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fti", *DIGITS], "'fti' is not a command; did you mean 'fit'?"),
        ([*DIGITS, "--node", "2"], "node (value 2): unknown key; did you mean 'nodes'"),
        ([], "model: must be set, usually in a --config file such as configs/digits.yaml."),
        (["--model", "lockstep.models.Classifier"], "data: must be set, usually in"),
        (["--model.lr", "1", *DIGITS], "model.lr (value 1): the class is not known yet; set model before its arguments."),
        # The annotation of network accepts any text; the classifier does not.
        ([*DIGITS, "--model.network", "resnet19"], "torchvision has no classification model 'resnet19'; did you mean 'resnet1"),
        ([*DIGITS, "--model.network", "lockstep.models.MPL"], "model.network: lockstep.models.MPL does not exist; did you"),
    ],
)
def test_message_of_a_mistake_that_the_parser_reports_otherwise(arguments: list[str], message: str) -> None:
    assert message in said(arguments)


GOOD = [
    "--trainer.max_epochs 3 --trainer.max_epochs=0x10 --trainer.max_epochs 1_000 --trainer.max_epochs null",
    "--trainer.max_steps -1 --trainer.limit_train_batches .5 --trainer.limit_val_batches 3 --trainer.val_check_interval 0.5",
    "--trainer.precision auto --trainer.deterministic warn --trainer.deterministic on --trainer.fast_dev_run true",
    "--trainer.max_time 00:01:00:00 --trainer.max_time.hours 3 --trainer.profiler simple --trainer.accelerator gpu",
    "--trainer '{max_epochs: 3}' --run '{name: a, test_after_fit: no}' --config '{run: {name: b}}' --trainer.logger=false",
    "--trainer.logger CSVLogger --trainer.logger.save_dir x",
    "--trainer.logger+=lightning.pytorch.loggers.CSVLogger --trainer.logger.save_dir=x --trainer.plugins null",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor x --trainer.callbacks+=Timer --trainer.callbacks.verbose=no",
    "--trainer.callbacks '[{class_path: EarlyStopping, init_args: {monitor: x}}, EMAWeightAveraging]'",
    "--trainer.callbacks null --trainer.callbacks [] --trainer.callbacks+=[Timer]",
    "--trainer.callbacks+=EMAWeightAveraging --trainer.callbacks.init_args.decay=0.9 --trainer.callbacks.multi_avg_fn=null",
    "--run.name 5 --run.name '-5' --run.name= --run.name '{a' --run.root 5 --wandb.entity null --wandb.notes 'lr: high'",
    "--wandb.tags [a,b] --wandb.tags+ c --wandb.mode offline --checkpoint.monitor null --ddp.bucket_cap_mb 1",
    "--seed_everything 0 --shared_filesystem no --ckpt_path null --ckpt_path 5 --strategy ddp",
    "--model.lr 1e-3 --model.lr 5 --model.lr .inf --model.lr ' 5' --model.lr null --model.init_args.lr 1E3",
    "--model.lr=0.1 --model lockstep.models.Classifier --model.optimizer sgd --model.schedule step --model.step_size 3",
    "--model.optimizer_args.momentum 0.9 --model.optimizer_args.a.b 1 --model.optimizer_args '{eps: 1}'",
    "--model '{lr: 7}' --model '{init_args: {lr: 7}}' --model.init_args '{lr: 3}' --model.dict_kwargs.x 3 --model.compile true",
    "--model.network resnet18 --model.num_classes 3 --model.network_args null",
    "--model.network lockstep.models.MLP --model.network.hidden [1] --model.network.init_args.shape '[1, 8, 8]'",
    "--model.network.widths [8] --model.init_args.network.init_args.widths [8]",
    "--model.network.class_path lockstep.models.MLP --model.network.dropout 0",
    "--model.network '{class_path: lockstep.models.MLP, init_args: {hidden: [3]}}' --model.network.init_args '{dropout: 1}'",
    "--model.network torchvision.models.resnet18 --model.network.num_classes 3",
    "--model.criterion CrossEntropyLoss --model.criterion.label_smoothing .1",
    "--model.criterion torch.nn.CrossEntropyLoss --model.criterion.label_smoothing .1 --model.criterion null",
    "--data.seed 3 --data.init_args.batch_size 3 --data lockstep.data.MNIST --data.augment no --data.root x",
    "--data lockstep.data.ImageFolder --data.mean [0,0,0] --data.on_corrupt skip --data.archive a.tar",
    "--data Digits --model Classifier",
]


@pytest.mark.parametrize("line", GOOD)
def test_arguments_that_the_parser_accepts_pass(line: str) -> None:
    arguments = [*DIGITS, *shlex.split(line)]
    assert parses(arguments)
    assert said(arguments) == ""


@pytest.mark.parametrize("arguments", [arguments for arguments, _ in NO_KEY + WRONG_VALUE + WRONG_CLASS])
def test_the_parser_refuses_what_validation_refuses(arguments: list[str]) -> None:
    assert not parses([*DIGITS, *arguments])


@pytest.mark.parametrize("arguments", [arguments for arguments, _ in NO_KEY[:4] + WRONG_VALUE[:1] + OUT_OF_RANGE])
def test_the_run_reports_what_static_validation_reports(arguments: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        parse_config([*DIGITS, *arguments])
    assert raised.value.message == said([*DIGITS, *arguments])


def test_the_keys_are_those_of_the_parser() -> None:
    known = {action.dest for action in make_parser()._actions if not re.search(r"help$|^print_|^==", action.dest)}
    assert set(ConfigValidator(SourceIndex(), []).keys()) | {"run", "ddp", "checkpoint", "wandb"} == known


def test_every_value_of_a_sweep_is_checked_with_the_others(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.lr: 'x' is not valid"):
        validate_sweep(DIGITS, {"model.network": ["lockstep.models.MLP", "lockstep.models.ConvNet"], "model.lr": ["0.1", "x"]})
    # A required argument may come from the sweep alone.
    text = "from lightning.pytorch import LightningModule as L\nclass M(L):\n def __init__(self, width: int, depth: int = 1): 0"
    written(tmp_path, text, "mine.py")
    mine = [*DIGITS, "--model", "mine.M"]
    with pytest.raises(UsageError, match=r"model\.width: must be set"):
        validate_sweep(mine, {"model.depth": ["1"]}, folders=[tmp_path])
    configs = validate_sweep(mine, {"model.depth": ["1", "2"], "model.width": ["10", "11"]}, folders=[tmp_path])
    points = [{"depth": 1, "width": 10}, {"depth": 2, "width": 10}, {"depth": 1, "width": 11}]
    assert [config["model"]["init_args"] for config in configs] == points


def test_a_module_that_only_the_container_has_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from only_in_the_image import Base\nclass Model(Base): pass\n")
    for path in ("only_in_the_image.Model", "mine.Model"):
        validate_arguments([*DIGITS, "--model", path], folders=[tmp_path], elsewhere=True)
    # The other Python may be newer, with syntax that this one lacks.
    (tmp_path / "newer.py").write_text("from lightning.pytorch import LightningModule as L\nclass M(L): pass\n\nfuture x = 1\n")
    assert validate_arguments(["--model", "newer.M"], folders=[tmp_path], elsewhere=True)["data"] is None
    with pytest.raises(UsageError, match="No module named 'only_in_the_image'"):
        validate_arguments([*DIGITS, "--model", "only_in_the_image.Model"], folders=[tmp_path])
    with pytest.raises(UsageError, match=r"mine\.Modle does not exist; did you mean 'mine.Model'"):
        validate_arguments([*DIGITS, "--model", "mine.Modle"], folders=[tmp_path], elsewhere=True)


def test_arguments_before_their_class_are_refused() -> None:
    for value in ("{1: x}", "{lr: 0.1}"):
        assert (
            said([f"--model={value}"]) == f"model (value {value}): the class is not known yet; set model before its arguments."
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: on}", "run.name: 'on', which YAML reads as True, is not valid: expected str; put it in quotes."),
        (
            "wandb: {tags: [a, no]}",
            "wandb.tags: 'no', which YAML reads as False, is not valid: expected str; put it in quotes.",
        ),
        ("trainer: {max_time: 1:00:00:00}", "trainer.max_time: '1:00:00:00', which YAML reads as 216000, is not valid: exp"),
        (
            "trainer: {callbacks: [{class_path: Timer, init_args: {duration: 1:01:00:00}}]}",
            "trainer.callbacks.duration: '1:01:00:00', which YAML reads as 219600, is not valid: expected str or dict or null",
        ),
        ("model.schedule: off", "model.schedule: 'off', which YAML reads as False, is not valid: expected one of 'constant'"),
        ("trainer: {max_epochs: yes}", "trainer.max_epochs: 'yes', which YAML reads as True, is not valid: expected int or n"),
        ("run: {name: 5}", "run.name: '5' is not valid: expected str."),
    ],
)
def test_a_text_that_yaml_reads_as_another_type_is_shown_as_it_was_typed(text: str, message: str, tmp_path: Path) -> None:
    assert said([*DIGITS, "--config", written(tmp_path, text)]).startswith(message)
    assert said([*DIGITS, "--config", text]).startswith(message)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--wandb.notes=see http://me:hidden@host/"],
        ["--model.optimizer_args={api_key: hidden}"],
        ["--trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: 'x://a:hidden@b'}}"],
    ],
)
def test_a_secret_is_refused_without_showing_it(arguments: list[str]) -> None:
    message = said([*DIGITS, *arguments])
    assert "the value looks like a secret, which config.yaml, launch.yaml and W&B would show" in message
    assert "hidden" not in message
    with pytest.raises(UsageError, match="looks like a secret"):
        validate_sweep(list(DIGITS), {"wandb.notes": ["a", "x://me:pw@host"]})
