"""README and docs: programs accept the commands in them, links lead somewhere, generated pages are fresh.

Nothing is started: each program parses its command, and ``local`` and ``submit`` check the config too, as they do for a user.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.configs import DIGITS, said, written
from support.runs import REPO

from lockstep.cli import COMMANDS, local, submit
from lockstep.config import find_shipped
from lockstep.config.validation.validate import validate_arguments
from lockstep.core import UsageError
from lockstep.slurm.submission import Submission
from pages import configuration, readme
from pages.commands import PAGES, Parsed, blocks, inline_commands, parse_only, shell_lines, simple_commands

README = (REPO / "README.md").read_text()
DOCS = "\n".join(page.read_text() for page in PAGES)

MAKEFILE = (REPO / "Makefile").read_text()

SCRIPTS = {
    "launch/local.py": "local", "launch/slurm.py": "submit", "launch/jobs.py": "jobs", "slurm/cluster.py": "cluster",
}  # fmt: skip

OTHERS = {
    "cd",
    "chmod",
    "cp",
    "df",
    "docker",
    "export",
    "git",
    "mkdir",
    "pip",
    "pre-commit",
    "scontrol",
    "sinfo",
    "source",
    "unset",
}
"""Programs that are not of lockstep, whose commands nothing here can check."""


class CheckedOnly(Submission):
    """A submission that ends when everything has been checked that needs no Slurm."""

    @classmethod
    def create(cls, *arguments: Any) -> NoReturn:
        Submission.create(*arguments)
        raise Parsed(submit.make_parser(""))


PLACEHOLDERS = {"JOB": "1234", "RUN": "runs/digits/<id>", "N": "3"}


def commands() -> list[str]:
    """All command lines of the pages, in blocks and in the text, each once."""
    found = list[str]()
    for page in PAGES:
        text = page.read_text()
        found += [line for block in blocks(text) for line in shell_lines(block)] + inline_commands(text)
    return list(dict.fromkeys(line.partition(" #")[0].strip() for line in found))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the pages speak of: a run, README's module, a profile ``mine``, folders of images, and shards."""
    (tmp_path / "configs").symlink_to(REPO / "configs")
    run = tmp_path / "runs/digits/<id>"
    run.mkdir(parents=True, mode=0o700)
    shutil.copy(REPO / "configs/digits.yaml", run / "config.yaml")
    (run / "launch.yaml").write_text("command: []\ncode: code\n")
    for name, content in files_of_readme().items():
        written(tmp_path, content, name)
    mine = tmp_path / "home/.config/lockstep/cluster/mine.yaml"
    mine.parent.mkdir(parents=True)
    shutil.copy(REPO / "configs/cluster/a100.yaml", mine)
    for split in ("train/cat", "val/cat", "test/cat"):
        for root in ("data/imagenet", "data/pets"):
            (tmp_path / root / split).mkdir(parents=True)
    (tmp_path / "data/packed/train").mkdir(parents=True)
    (tmp_path / "data/packed/train/000000.tar").touch()
    # Not another object as os.environ: a module that is imported meanwhile would keep it.
    for name in {*os.environ} - {"PATH"}:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USER", "me")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def files_of_readme() -> dict[str, str]:
    """The files that README tells a user to write, by name."""
    return {block.file: block.content for block in blocks(README) if block.file is not None}


@pytest.mark.parametrize("line", commands())
def test_every_command_is_accepted(line: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["bash", "-n"], input=re.sub(r"<\w+>|[\[\]…]", "", line), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    line = line.replace(" …", "").replace("/data/", f"{project}/data/").replace("/shared/", f"{project}/")
    for words in simple_commands(re.sub(r"\[((?:JOB|-)[^\]]*)\]", r"\1", line)):
        check([PLACEHOLDERS.get(word, word) for word in words], monkeypatch)


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a command; raise what its program raises."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, *rest = words
    match program, *rest:
        case ("make", *targets):
            if targets[:1] == ["-C"]:
                targets = targets[2:]
            for target in targets:
                assert "=" in target or re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"make {target}: unknown"
        case ("lockstep", command, *arguments):
            check_own(command, arguments, monkeypatch)
        case ("python" | ".venv/bin/python", "-m", "pytest", *arguments):
            assert all((REPO / argument).exists() for argument in arguments if "/" in argument)
        case ("python", script, *arguments):
            assert (REPO / script).is_file()
            if script in SCRIPTS:
                check_own(SCRIPTS[script], arguments, monkeypatch)
            else:
                parse_only(import_module(Path(script).stem).main, arguments)
        case ("torchrun", "--nproc-per-node", "2", "-m", "lockstep.cli", command, *arguments):
            check_own(command, arguments, monkeypatch)
        case _:
            assert program in OTHERS, f"{program}: no test knows this program"


def check_own(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a command of lockstep."""
    if command.startswith("--"):
        assert command in ("--version", "--help")
    elif command in ("submit", "plan"):
        monkeypatch.setattr(submit, "Submission", CheckedOnly)
        with pytest.raises(Parsed):
            submit._submit([*arguments, *(["--plan"] if command == "plan" else [])], "lockstep submit", None)
    elif command == "local":
        monkeypatch.setattr("lockstep.trainer.local.run_locally", lambda *_: 0)
        assert local.main(arguments) == 0
    elif command == "train":
        assert said(find_shipped(arguments)) == ""
    else:
        parse_only(import_module(f"lockstep.{COMMANDS[command][0]}").main, arguments)


FLAGS = r"`(--(?:model|trainer|wandb|data|shared|run|checkpoint)[^`<]*[ =][^`<]*)`"


@pytest.mark.parametrize("flags", sorted(set(re.findall(FLAGS, DOCS))))
def test_flags_in_the_text_are_accepted(flags: str, project: Path) -> None:
    images = any(key in flags for key in ("--data.on_corrupt", "--data.archive", "--data.decode", "--data.root"))
    arguments = ["--config", str(REPO / "configs/imagenet.yaml")] if images else [*DIGITS]
    assert said([*arguments, *shlex.split(flags.replace("…", ""))], project) == ""


WRONG = (
    *("lockstep local --model.lrr 1", "lockstep local --ranks 0", "lockstep submit --profil a100", "lockstep sync"),
    *("lockstep plan --config digitz", "lockstep jobs lst", "lockstep cluster upp", "lockstep export runs/digits/<id>"),
    *("python launch/local.py --config nothing.yaml", "python benchmarks/nothing.py", "python benchmarks/step.py --rank 2"),
    *("make nothing", "lockstp local", "nothing --at --all"),
)


def test_a_wrong_command_is_noticed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in (
        "lockstep local --model.lrr 1",
        "lockstep submit --profil a100",
        "lockstep jobs lst",
        "lockstep plan --config digitz",
    ):
        with pytest.raises((UsageError, AssertionError, SystemExit)):
            check(shlex.split(line), monkeypatch)
    for line in ("make nothing", "lockstp local", "python benchmarks/nothing.py", "lockstep cluster upp"):
        with pytest.raises((AssertionError, SystemExit)):
            check(shlex.split(line), monkeypatch)


def test_the_cluster_image_has_the_packages_of_make_slurm() -> None:
    lists = re.findall(r"^(?:SLURM|ACCOUNTING)_PACKAGES := (.*)", MAKEFILE, re.MULTILINE)
    image = (REPO / "Dockerfile").read_text().partition("FROM lockstep AS cluster")[2].partition("FROM ")[0]
    assert len(lists) == 2 and set(" ".join(lists).split()) <= set(image.split())


def test_links_lead_to_a_page_and_a_heading() -> None:
    for page in PAGES:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {path}"
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, f"{page.name}: {path}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    listed = set(re.findall(r"^([\w-]+)$", (REPO / "docs/index.md").read_text(), re.MULTILINE))
    assert listed == {page.stem for page in (REPO / "docs").glob("*.md")} - {"index"}


def test_the_module_of_readme_is_accepted_and_is_that_of_the_docs(project: Path) -> None:
    config = validate_arguments(["--config", "mine.yaml"], folders=[project])
    assert config["model"] == {"class_path": "mine.Line", "init_args": {"lr": 0.3}}
    assert said(["--config", "mine.yaml", "--model.lrr", "1"], project) == (
        "model.lrr (value 1): unknown argument of mine.Line; did you mean 'model.lr'?"
    )
    assert all(content in (REPO / "docs/your-code.md").read_text() for content in files_of_readme().values())


def test_readme_is_short_and_its_commands_are_run_in_order() -> None:
    assert len(README.splitlines()) <= 150
    steps = "".join(readme.steps(README))
    for before, after in itertools.pairwise(
        ["lockstep local --", "cat > mine.py", "cat > mine.yaml", "lockstep cluster up", "--follow", "cluster down"]
    ):
        assert 0 <= steps.index(before) < steps.index(after)
    assert "pip install" not in steps and "<id>" not in re.sub(r"say '.*", "", steps)


def test_the_page_of_the_configuration_is_generated_from_the_keys() -> None:
    assert configuration.PAGE.read_text() == configuration.page(), f"{configuration.PAGE} is stale: make pages"


def test_every_key_has_a_type_and_a_help() -> None:
    keys = [key for keys in configuration.sections().values() for key in keys]
    assert len(keys) >= 150
    for key in keys:
        assert key.help and (key.type or key.name.startswith("--")), f"{key.name} has no help, or no type"
