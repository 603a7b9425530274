"""README and docs: their commands, configs and links are valid."""

import re
import shlex
from pathlib import Path

import pytest
from support.configs import DIGITS, said, written
from support.runs import REPO

from lockstep.config.validation.validate import validate_arguments

README = (REPO / "README.md").read_text()
DOCS = "\n".join([README, *(path.read_text() for path in sorted((REPO / "docs").glob("*.md")))])


def documented_commands() -> list[str]:
    """Arguments of the launcher in the command lines of README and docs, and the flags in their text."""
    lines = re.findall(r"^(?:\$ )?(?:python launch/local\.py|lockstep train) ([^#\n]*)", DOCS, re.MULTILINE)
    return [line.strip() for line in lines] + re.findall(
        r"`(--(?:model|trainer|wandb|data|shared)[^`]* [^`]*|--trainer[^`]*=[^`]*)`", DOCS
    )


@pytest.mark.parametrize("line", documented_commands())
def test_every_command_of_the_docs_passes(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    arguments = shlex.split(re.sub(r"--(?:ranks|nodes|resume) \S+", "", line))
    at = 1 if arguments and not arguments[0].startswith("-") else 0
    if "--config" not in arguments:
        images = any(key in line for key in ("--data.on_corrupt", "--data.archive"))
        arguments[at:at] = ["--config", str(REPO / "configs/imagenet.yaml")] if images else DIGITS
    assert said(arguments) == ""


def test_the_docs_are_read() -> None:
    assert len(documented_commands()) >= 20


def test_links_lead_to_a_page_and_a_heading() -> None:
    for page in [REPO / "README.md", *(REPO / "docs").glob("*.md")]:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {path}"
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, f"{page.name}: {path}#{anchor}"


def test_the_user_module_of_the_readme_passes(tmp_path: Path) -> None:
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", README, re.DOTALL)
    module, config_file = (next(block for block in blocks if mark in block) for mark in ("class Line(", "mine.Line"))
    written(tmp_path, module, "mine.py")
    config = validate_arguments(["--config", written(tmp_path, config_file)], folders=[tmp_path])
    assert config["model"] == {"class_path": "mine.Line", "init_args": {"lr": 0.3}}
    assert said(["--config", str(tmp_path / "mine.yaml"), "--model.lrr", "1"], tmp_path) == (
        "model.lrr (value 1): unknown argument of mine.Line; did you mean 'model.lr'?"
    )
