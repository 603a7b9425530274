"""launch/local.py as a user runs it: usage errors in this process, then new processes, which import torch."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import REPO, Launch

from lockstep.cli import local
from lockstep.trainer import session

SCRIPT = str(REPO / "launch" / "local.py")
QUICK = ("--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "5")


def run_folder(root: Path) -> Path:
    (folder,) = root.glob("*/*")
    return folder


@pytest.mark.parametrize("arguments", [["--ranks", "0"], ["--nodes", "two"], ["--ranks"]])
def test_a_wrong_flag_of_the_launcher_is_refused_at_once(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(arguments) == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_mistakes_are_told_without_torch(tmp_path: Path) -> None:
    code = f"import sys, runpy; sys.argv = ['local.py', '--rank', '2']\ntry: runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
    code += "except SystemExit as error: print(error.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, "did you mean 'ranks'" in done.stderr) == ("2 False\n", True), done.stderr


def test_help_needs_no_torch() -> None:
    code = f"import sys, runpy; sys.argv = ['local.py', '--help']\ntry: runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--nodes" in done.stdout and done.stdout.rstrip().endswith("False")


@pytest.mark.parametrize(
    ("number", "ranks", "status"), [(signal.SIGINT, "1", 130), (signal.SIGINT, "2", 130), (signal.SIGTERM, "1", 143)]
)
def test_a_signal_ends_all_ranks(tmp_path: Path, number: signal.Signals, ranks: str, status: int) -> None:
    command = [sys.executable, SCRIPT, "--ranks", ranks, "--run.root", str(tmp_path), "--trainer.max_epochs", "10000"]

    def heed_ctrl_c() -> None:  # a shell's background job, as these tests may be, ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_ctrl_c
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "step " in line:
                    break
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.killpg(process.pid, number)
            assert process.wait(30) == status
            assert "Traceback" not in process.stderr.read()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    result = json.loads((run_folder(tmp_path) / "result.json").read_text())
    if ranks == "1":
        assert (result["status"], result["reason"]) == ("interrupted", "Ctrl-C" if number == signal.SIGINT else "SIGTERM")
    # With several, one that was in a collective may hear of the end of its peer before it hears of Ctrl-C.
    assert result["status"] in ("interrupted", "failed")
    assert json.loads((run_folder(tmp_path) / "status.json").read_text())["status"] == result["status"]


def test_torchrun_starts_the_same_run(tmp_path: Path, launch: Launch) -> None:
    local = launch("--ranks", "2", "--config", str(REPO / "configs" / "digits.yaml"), *QUICK)
    tmp_path = tmp_path / "torchrun"
    config = ["--config", str(REPO / "configs" / "digits.yaml"), "--run.root", str(tmp_path), *QUICK]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shown = ["--trainer.profiler", "simple", "--trainer.enable_model_summary", "true"]
    done = subprocess.run(
        [*launcher, "-m", "lockstep.cli", "train", *config, *shown], capture_output=True, text=True, timeout=55
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("FIT Profiler Report") == 1
    assert (done.stdout + done.stderr).count("Trainable params") == 1
    result = json.loads((run_folder(tmp_path) / "result.json").read_text())
    assert (result["status"], result["world_size"], result["global_step"]) == ("finished", 2, 20)
    assert result["weights_sha256"] == local.result["weights_sha256"]


def test_python_m_lockstep_train_says_what_is_wrong_and_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "lockstep.cli", "train", "tset"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "lockstep: 'tset' is not a command; did you mean 'test'?\n")


def test_a_contradiction_in_the_environment_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCKSTEP_RENDEZVOUS": "file:///r"}
    assert session.main([], env) == 2
    assert "lockstep: 5 ranks do not divide into nodes of 2" in capsys.readouterr().err
