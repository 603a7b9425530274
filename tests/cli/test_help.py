"""Help and completion, without torch; completion in a real bash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import REPO
from support.terminal import Terminal

from lockstep.cli import completion, jobs, local, plan, submit
from lockstep.cli.completion import script
from lockstep.config import SHIPPED, describe_files


@pytest.mark.parametrize("columns", [80, 100])
def test_help_is_in_groups_and_lists_the_configs(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = submit.make_parser("lockstep submit").format_help()
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    groups = ["resources:", "job:", "show only, and submit nothing:", "show only, about the config:"]
    assert titles == ["options:", *groups, "configs, by --config NAME:", "profiles, by --profile NAME:"]
    for path in SHIPPED.rglob("*.yaml"):
        assert f"\n  {path.stem} " in text
    end = text[text.index("show only, about") : text.index("completion of")]
    assert max(map(len, end.splitlines())) < columns
    assert "resources:" in local.make_parser("lockstep local").format_help()


def test_the_help_of_plan_has_nothing_that_submits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    text = capsys.readouterr().out
    assert "usage: lockstep plan" in text and "memory that a model needs" in text and "--ranks-per-node" in text
    assert not any(word in text for word in ("Submit a run", "job id", "--sweep", "--follow", "--dry-run", "--after"))


def test_each_shipped_file_begins_with_a_sentence() -> None:
    for folder in (SHIPPED, SHIPPED / "cluster"):
        for name, sentence in describe_files(folder).items():
            assert len(sentence) > 20 and sentence.endswith("."), name
    assert describe_files()["imagenet"].endswith("et al. 2017: SGD, 5 epochs of warm-up, label smoothing.")


def test_a_closed_pipe_ends_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert completion.main(["bash"]) == 0


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "lockstep.bash"
    path.write_text(script("bash"))
    return path


LINES = {
    "lockstep loc": "local",
    "lockstep local --strategy ": "ddp deepspeed",
    "python launch/local.py --config dig": "digits",
    "python launch/local.py --config conf": "configs",
    "./launch/local.py --trainer.max_e": "--trainer.max_epochs",
    "python3 -X dev launch/local.py pred": "predict",
    "python launch/local.py --model.schedule c": "constant cosine",
    "python launch/local.py --ddp.static_graph ": "true false",
    "python launch/local.py --model lock": "lockstep.models.Classifier",
    "python launch/local.py --resume sr": "src",
    "python launch/slurm.py --profile a1": "a100",
    "python launch/slurm.py --then exp": "export",
    "python launch/slurm.py --nodes 2 --deepspeed.stage ": "1 2 3",
    "python launch/jobs.py lo": "logs",
    "python launch/jobs.py logs --ra": "--rank",
    "python -m lockstep.cli plan --gpu-": "--gpu-memory",
    "lockstep pack --shorter": "--shorter-side",
    "python setup.py inst": "",
}


def test_completion_in_bash(bash_script: Path) -> None:
    calls = [f"complete_line {line}" + ("''" if line.endswith(" ") else "") for line in LINES]
    code = f"""
source {bash_script}
complete_line() {{
  COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
  local how=$(complete -p "${{1##*/}}")
  [[ $how =~ -F\\ ([^ ]+) ]] && "${{BASH_REMATCH[1]}}"
  echo "${{COMPREPLY[*]}}"
}}
"""
    done = subprocess.run(["bash", "-c", "\n".join([code, *calls])], cwd=REPO, capture_output=True, text=True)
    assert dict(zip(LINES, done.stdout.splitlines(), strict=True)) == LINES, done.stderr


def test_the_tab_key_completes(bash_script: Path) -> None:
    def main() -> int:
        return subprocess.run(["bash", "--norc", "--noprofile", "-i"]).returncode

    terminal = Terminal(main, 100, REPO)
    terminal.type(f"PS1='> '; source {bash_script}; echo re''ady\n")
    terminal.wait_for("ready")
    terminal.type("python launch/local.py --trainer.max_ep\t")
    terminal.wait_for("--trainer.max_epochs ")
    terminal.type("\x15exit 0\n")  # Ctrl-U: instead of the line
    assert terminal.wait() == 0


def test_completion_in_zsh_has_the_keys() -> None:
    text = script("zsh")
    for word in ("#compdef lockstep", "--trainer.max_epochs", "ddp deepspeed", "logs"):
        assert word in text


def test_jobs_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        jobs.main(["--help"])
    assert "commands:\n  COMMAND\n    list" in capsys.readouterr().out
