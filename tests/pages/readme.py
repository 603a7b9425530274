"""Run README's commands in an empty folder, with the wheel installed in a new environment: ``make readme``.

Everything in README's blocks is run word for word and in order, in one shell; the first command that fails ends it. Only
``<id>`` stands for the id of the first run. Left out is the section Install: this script builds the wheel of these sources and
installs it into a new environment. lockstep's dependencies are those of the environment that runs the script, because torch
takes minutes and gigabytes. So this does not show that the wheel names all of its dependencies; ``make setup`` installs what
``pyproject.toml`` names. The home folder is new too. The shell starts README's Slurm cluster in its usual folder.
"""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.runs import REPO
from support.wheel import build

from lockstep.slurm.cluster import Cluster
from pages.commands import blocks, shell_lines

README = REPO / "README.md"

FIRST_RUN = "runs/digits/$(ls runs/digits | head -n 1)"

FIRST_RUN_OF_PYTHON = "'runs/digits/' + sorted(__import__('os').listdir('runs/digits'))[0]"

CLUSTER = Path("/tmp", f"lockstep-slurm-{os.geteuid()}")
"""The folder of a cluster that is started without ``--folder``."""


def steps(text: str) -> Iterator[str]:
    """What a reader of the page does, as lines for bash: write the files, run the commands."""
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        for block in blocks(section) if not section.startswith("Install\n") else ():
            for line in shell_lines(block):
                yield f"say {shlex.quote(line)}\n{line.replace('runs/digits/<id>', FIRST_RUN)}\n"
            if block.file is not None:
                yield f"cat > {block.file} <<'END'\n{block.content}END\n"
            elif block.language == "python":
                lines = block.content.replace('"runs/digits/<id>"', FIRST_RUN_OF_PYTHON)
                yield f"say 'the lines of Python'\npython <<'END'\n{lines}END\n"


def install(folder: Path) -> Path:
    """Make an environment in ``folder`` with the wheel, and the other packages of this one; return its programs' folder."""
    wheel, environment = build("wheel", folder), folder / "environment"
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, environment], check=True)
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--python", environment, wheel],
        check=True,
    )
    (packages,) = environment.glob("lib/python*/site-packages")
    # Python does not read the .pth files of a folder that a .pth file names: the editable lockstep is not among them.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return environment / "bin"


def main() -> int:
    """Run README's commands and return the exit status of the first that fails, or 0."""
    if Cluster.find(CLUSTER) is not None:
        print(f"a cluster is up in {CLUSTER}, which README's last command would end; end it first: lockstep cluster down")
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        programs = install(folder)
        for name in ("empty", "home"):
            (folder / name).mkdir()
        ours = ("PYTHON", "SLURM", "WANDB", "LOCKSTEP", "VIRTUAL_ENV", "UV", "XDG")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        env |= {"HOME": str(folder / "home"), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        script = ["set -eu -o pipefail", "say() { printf '\\n== %s s: %s\\n' $SECONDS \"$1\"; }", *steps(README.read_text())]
        try:
            bash = ["bash", "-c", "\n".join([*script, "say 'all commands have passed'"])]
            return subprocess.run(bash, cwd=folder / "empty", env=env, stderr=subprocess.STDOUT).returncode
        finally:
            if (cluster := Cluster.find(CLUSTER)) is not None:
                cluster.down()


if __name__ == "__main__":
    sys.exit(main())
