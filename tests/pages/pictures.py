"""Write the pictures of README from a real run: ``make pictures``."""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text
from support.runs import REPO

IMAGES = REPO / "docs" / "images"

ARGUMENTS = ("local", "--ranks", "2", "--trainer.max_epochs", "10", "--run.name", "first")

COLUMNS = 110


def main() -> None:
    """Train; write what the terminal shows as an SVG, and the report with fewer colours."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lockstep.cli", *ARGUMENTS]
        # With its programs on the PATH, it prints no path of this machine.
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "WANDB_MODE": "offline", "PATH": programs}
        done = subprocess.run(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True, check=True)
        console = Console(record=True, width=COLUMNS, file=io.StringIO())
        console.print(Text(f"$ lockstep {' '.join(ARGUMENTS)}", style="bold"))
        for line in done.stderr.replace(f"{folder}/", "").replace("[rank 0] ", "").splitlines():
            style = "green" if re.search(r" finished| test/", line) else ""
            console.print(Text(line, style, overflow="ellipsis", no_wrap=True))
        svg = console.export_svg(title="lockstep", unique_id="terminal")
        # Without the fonts that rich would load from a server.
        (IMAGES / "terminal.svg").write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL))
        (report,) = Path(folder).glob("runs/*/*/report.png")
        Image.open(report).convert("RGB").quantize(64).save(IMAGES / "report.png", optimize=True)


if __name__ == "__main__":
    main()
