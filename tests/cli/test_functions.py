"""The functions of ``import lockstep``: their arguments, what they read, an interruption, and a real Jupyter kernel.

The kernel runs the examples of docs/python.md; all tests share its run.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from support.configs import said
from support.runs import REPO

import lockstep
from lockstep.checkpoint import Manifest, Progress
from lockstep.cli import child, functions
from lockstep.cli.child import EndedCommand, run_command
from lockstep.cli.functions import Config
from lockstep.models import Classifier, ConvNet
from lockstep.runs import LaunchRecord, Owner

PAGE = (REPO / "docs" / "python.md").read_text()


class Recorded(Exception):
    """Carries the arguments of a command that was not run."""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands raise their arguments instead of running."""

    def record(arguments: list[str]) -> EndedCommand:
        raise Recorded(arguments)

    monkeypatch.setattr(functions, "run_command", record)


def typed(*configs: Config, **options: Any) -> list[str]:
    """The command line of a ``fit``."""
    with pytest.raises(Recorded) as raised:
        lockstep.fit(*configs, **options)
    arguments: list[str] = raised.value.args[0]
    return arguments


@pytest.mark.usefixtures("recorded")
def test_configs_become_the_arguments_of_the_command(tmp_path: Path) -> None:
    assert typed() == ["local", "fit"]
    assert typed("digits", {"model.lr": 0.1}, ranks=2) == ["local", "fit", "--ranks=2", "--config=digits", "--model.lr=0.1"]
    nested = {"trainer": {"max_epochs": np.int64(3), "limit_val_batches": np.float32(0.5)}, "wandb.tags": ("a", "b")}
    assert typed("digits", nested)[3:] == [
        "--trainer.max_epochs=3",
        "--trainer.limit_val_batches=0.5",
        '--wandb.tags=["a", "b"]',
    ]
    assert typed("digits", {"run.root": tmp_path, "wandb.notes": None, "checkpoint": {"async_save": False}})[3:] == [
        *(f"--run.root={tmp_path}", "--wandb.notes=null", "--checkpoint.async_save=false")
    ]
    network = {"class_path": ConvNet, "init_args": {"in_channels": 1, "num_classes": 10}}
    whole = typed({"model": {"class_path": Classifier, "init_args": {"network": network}}, "data": "lockstep.data.Digits"})
    assert whole[2] == "--config={}" and '"class_path": "lockstep.models.networks.ConvNet"' in whole[3]
    assert said(whole[2:]) == ""


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("digitz", "config: digitz does not exist; did you mean 'digits'?"),
        ({"model.learning_rate": 1}, r"model.learning_rate \(value 1\): unknown argument of lockstep.models.Classifier"),
        ({"trainer": {"max_epoch": 1}}, "trainer.max_epoch .* did you mean 'trainer.max_epochs'"),
        ({"ranks": 2}, "ranks .*unknown key"),
        ({"help": None}, "--help=null shows help or a config and trains nothing; give it to lockstep local"),
        ({"model": torch.nn.Linear(1, 1)}, "model: an object of Linear cannot be passed to the ranks.*'class_path'"),
        ({"model": "__main__.Mine"}, "model: Mine is defined in this notebook or script.*%%writefile mine.py.*'mine.Mine'"),
        ({"model.network": type("Net", (), {"__module__": "__main__"})}, "model.network: Net is defined in this notebook"),
    ],
)
def test_a_wrong_config_is_refused_before_a_process_starts(config: str | Mapping[str, Any], message: str) -> None:
    with pytest.raises(lockstep.UsageError, match=message):
        lockstep.fit(config)


@pytest.mark.usefixtures("recorded")
def test_submit_has_the_flags_of_the_command() -> None:
    with pytest.raises(Recorded) as raised:
        lockstep.submit("digits", nodes="2-4", sweep={"model.lr": [0.1, 3e-2]}, ranks_per_node=2, exclusive=True, after=None)
    assert raised.value.args[0] == [
        *("submit", "fit", "--nodes=2-4", "--sweep=model.lr=0.1,0.03", "--ranks-per-node=2", "--exclusive", "--config=digits")
    ]
    with pytest.raises(Recorded) as raised:
        lockstep.submit(then=["test --nodes 2", "export"], after=[12, "runs/x"])
    assert raised.value.args[0][2:] == ["--then=test --nodes 2", "--then=export", "--after=12", "--after=runs/x"]
    with pytest.raises(lockstep.UsageError, match=r"dry_run: submits no job; use lockstep submit --dry-run"):
        lockstep.submit(dry_run=True)
    with pytest.raises(lockstep.UsageError, match=r"sweep: seed_everything: '12' must be a list of values"):
        lockstep.submit(sweep={"seed_everything": "12"})


@pytest.mark.usefixtures("recorded")
def test_the_other_calls_of_the_page_are_calls_of_valid_commands() -> None:
    calls = re.findall(r"^(?:job = )?(lockstep\.(?:fit|submit)\(.*\))$", PAGE, re.MULTILINE)
    assert len(calls) == 4
    for call in calls:
        with pytest.raises(lockstep.UsageError if "resume=" in call else Recorded) as raised:
            eval(call)
        assert "resume=" not in call or "20261127-171423-1483 does not exist" in str(raised.value)


@pytest.mark.usefixtures("recorded")
def test_an_evaluation_has_the_config_of_its_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    config = tmp_path / "config.yaml"
    config.write_text((REPO / "configs/digits.yaml").read_text())
    (call,) = re.findall(r"^(lockstep\.test\(.*\))\.metrics$", PAGE, re.MULTILINE)
    for place in (lockstep.FinishedRun(tmp_path, lockstep.RunResult("finished")), str(tmp_path), checkpoint):
        with pytest.raises(Recorded) as raised:
            eval(call, {"lockstep": lockstep, "run": place})
        given = Path(place)
        assert raised.value.args[0] == ["local", "test", f"--config={config}", "--data.batch_size=120", f"--ckpt_path={given}"]


def test_the_ranks_find_modules_where_the_notebook_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "own"))
    monkeypatch.setattr(sys, "path", ["", *sys.path, str(tmp_path), str(tmp_path / "missing")])
    found = child._python_path()
    assert found[0] == str(tmp_path / "own") and found[-1] == str(tmp_path)
    assert not [entry for entry in found if entry.endswith("site-packages")]


def test_a_module_that_is_not_found_names_the_folder_of_the_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("model: {class_path: nowhere.Net}")
    LaunchRecord("lockstep submit", 1, 1, folder="/home/me/project").write(tmp_path / "launch.yaml")
    (checkpoint / "rank-0.pt").write_bytes(b"123")
    Manifest(Progress(1, 0, 0, 0, 0, 0, 0), 1, 1, 0.0, {"rank-0.pt": (3, sha256(b"123").hexdigest())}).write(checkpoint)
    with pytest.raises(
        lockstep.UsageError, match=r"model .nowhere.Net.: No module named .nowhere.; .*such as /home/me/project"
    ):
        lockstep.load(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"model: \xff")
    with pytest.raises(lockstep.UsageError, match=r"config.yaml is damaged: .*invalid start byte"):
        lockstep.load(tmp_path)


def test_a_file_near_the_root_has_no_run_folder() -> None:
    with pytest.raises(lockstep.UsageError, match=r"/etc/passwd is not in a run folder, .* with load_from_checkpoint of"):
        lockstep.load("/etc/passwd")


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, lockstep; print([name for name in sys.modules if name.startswith(('lockstep.', 'torch', 'yaml'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        getattr(lockstep, "fitt")  # noqa: B009  # mypy knows that it is not there
    assert set(lockstep.__all__) <= set(dir(lockstep))


def test_metrics_of_a_run_that_trains_are_its_whole_rows(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("lockstep/row,step,epoch,val/loss\r\n1,5,0,\r\n2,10,1,0.5\r\n3,15,")
    assert lockstep.read_metrics(tmp_path) == [
        {"lockstep/row": 1, "step": 5, "epoch": 0},
        {"lockstep/row": 2, "step": 10, "epoch": 1, "val/loss": 0.5},
    ]
    metrics.write_text("step\nx\n")
    with pytest.raises(lockstep.UsageError, match=r"metrics.csv is damaged: could not convert"):
        lockstep.read_metrics(tmp_path)
    with pytest.raises(lockstep.UsageError, match="nowhere does not exist; give a run folder"):
        lockstep.load(tmp_path / "nowhere")
    with pytest.raises(lockstep.UsageError, match=r"result.json does not exist"):
        lockstep.read_result(tmp_path)


def test_an_error_of_a_command_is_its_last_message() -> None:
    owner = Owner.this_process()
    assert EndedCommand(2, owner, "", "note\nlockstep: one\nlockstep: model.lr: wrong\n").error == "model.lr: wrong"
    assert EndedCommand(1, owner, "", "Traceback\nValueError: why\n").error == "ValueError: why"


def test_an_error_that_the_process_finds_is_raised(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((REPO / "configs/digits.yaml").read_text())
    lockstep.RunResult("interrupted", reason="Ctrl-C").write(tmp_path / "result.json")  # of an attempt before
    with pytest.raises(lockstep.UsageError, match=r"^wandb.mode: online needs an API key"):
        lockstep.fit({"wandb.mode": "online"}, resume=tmp_path)


def test_ctrl_c_ends_the_process_too(tmp_path: Path) -> None:
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_command(["local", f"--run.root={tmp_path}"])


class Kernel:
    """A Jupyter kernel."""

    def __init__(self, folder: Path) -> None:
        env = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(REPO / "src")}
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder), env=env)

    def run(self, code: str) -> str:
        """Run a cell and return its output; that of an error is what the notebook shows."""
        shown: list[str] = []

        def add(message: dict[str, Any]) -> None:
            content = message["content"]
            data = content.get("data", {}).get("text/plain", "")
            shown.append(content.get("text") or data or "\n".join(content.get("traceback", ())))

        self.client.execute_interactive(code, timeout=120, allow_stdin=False, output_hook=add)
        return "".join(shown)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    started = Kernel(tmp_path_factory.mktemp("notebook"))
    yield started
    started.client.stop_channels()
    started.manager.shutdown_kernel(now=True)


@pytest.mark.timeout(170)
def test_the_examples_of_the_page_run_in_a_notebook(kernel: Kernel) -> None:
    fit, load, lightning, images, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    # A process that has run backward, as a notebook often has, cannot fork ranks.
    assert kernel.run("import torch\ntorch.ones(1, requires_grad=True).backward()") == ""
    shown = kernel.run(fit)
    assert "epoch 2/2" in shown and float(shown.splitlines()[-1]) > 0.8, shown
    assert kernel.run(f"{load}\nprint(module.training, module.device, [step for step, _ in losses])") == "False cpu [20, 40]\n"
    assert kernel.run(lightning) == ""
    same = "torch.equal(module(images), lockstep.load(run)(images)) and accuracy.item() == run.metrics['test/accuracy']"
    assert kernel.run(f"{images}\n{same}") == "True"
    shown = kernel.run("class Mine(Classifier): pass\nlockstep.fit('digits', {'model': Mine})")
    assert shown.startswith("UsageError: model: Mine is defined in this notebook") and "\n" not in shown
    assert kernel.run("lockstep.read_result(run) == run.result") == "True"
