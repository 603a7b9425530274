"""launch/local.py on a real pseudo-terminal: progress, Ctrl-C, breakpoint()."""

import os
import re
import runpy
import shlex
import sys
from pathlib import Path

from support.runs import REPO
from support.terminal import Terminal

SCRIPT = str(REPO / "launch" / "local.py")

MODULE = """
from lockstep.models import Classifier

class Stop(Classifier):
    def training_step(self, batch, batch_idx):
        breakpoint()
        return super().training_step(batch, batch_idx)
"""


def local(columns: int, folder: Path, *arguments: str) -> Terminal:
    """``python launch/local.py`` with these arguments, in ``folder``."""

    def main() -> int:
        sys.argv[1:] = arguments
        sys.path.insert(0, str(folder))
        runpy.run_path(os.path.relpath(SCRIPT), run_name="__main__")
        return 1

    return Terminal(main, columns, folder)


def test_progress_and_ctrl_c_with_one_rank_at_80_columns(tmp_path: Path, parser_is_made: None) -> None:
    terminal = local(80, tmp_path, "--trainer.max_epochs", "60", "--run.root", "my runs")
    terminal.wait_for(" left  ")
    terminal.wait_for("epoch 2/60  train/loss")
    terminal.type("\x03")
    assert terminal.wait() == 130
    lines = terminal.screen()
    assert re.fullmatch(r"\d\d:\d\d:\d\d epoch 1/60  train/loss 1\.\d+  train/accuracy 0\.\d+  val/loss 1\.\d+", lines[0])
    assert re.fullmatch(r" {9}val/accuracy 0\.\d+  \d+% waiting for data", lines[1])
    assert "epoch 2/60" in lines[2]
    assert "stopped by Ctrl-C after step" in "".join(lines[3:])  # the terminal drops what it has not shown at a Ctrl-C
    shown = re.findall(r"\r(epoch .*?)\x1b\[K\r", terminal.raw)
    assert any(re.match(r"epoch \d+/60  step \d+/1200  \d+:\d\d left  \d+ samples/s  train/loss ", line) for line in shown)
    assert max(map(len, shown)) < 80
    # What is left is a clean line with a command that can be pasted.
    command = re.search(r"^interrupted; to resume: (.*)\r$", terminal.raw.replace("\r\x1b[K", ""), re.MULTILINE)
    assert command is not None and "^C" not in "".join(lines)
    _, script, flag, run = shlex.split(command[1])
    assert (script, flag) == (os.path.relpath(SCRIPT, tmp_path), "--resume")
    assert Path(run).parent == tmp_path / "my runs" / "digits" and (Path(run) / "config.yaml").is_file()


def test_progress_and_ctrl_c_with_two_ranks_at_100_columns(tmp_path: Path, parser_is_made: None) -> None:
    terminal = local(100, tmp_path, "--ranks", "2", "--trainer.max_epochs", "60")
    terminal.wait_for("epoch 1/60  train/loss")
    terminal.wait_for(" left  ")
    terminal.type("\x03")
    assert terminal.wait() == 130
    lines = terminal.screen()
    assert re.fullmatch(r"[\d:]+ \[rank 0\] epoch 1/60  train/loss [\d.]+  train/accuracy [\d.]+  val/loss [\d.]+", lines[0])
    assert "^C" not in "".join(lines)
    assert [line for line in lines if line.startswith("interrupted; to resume: ")]


def test_a_debugger_has_the_terminal_and_is_left_in_one_line(tmp_path: Path, parser_is_made: None) -> None:
    (tmp_path / "stop_here.py").write_text(MODULE)
    terminal = local(80, tmp_path, "--model", "stop_here.Stop", "--trainer.max_steps", "9")
    # Python's readline notices a Ctrl-C between the prompt and its wait for a key only with that key: hence Enter after it.
    for typed, answer in (("p tuple(batch[0].shape)", "(64, 1, 8, 8)"), ("c", "-> "), ("\x03", "--KeyboardInterrupt--")):
        terminal.wait_for("(Pdb) ")
        terminal.type(f"{typed}\n")
        terminal.wait_for(answer)
    terminal.wait_for("(Pdb) ")
    terminal.type("q\n")
    assert terminal.wait() == 1
    assert "Traceback" not in terminal.raw
    assert terminal.screen()[-2:] == ["lockstep: The run was ended in the debugger.", ""]


def test_a_debugger_is_refused_to_several_ranks(tmp_path: Path, parser_is_made: None) -> None:
    (tmp_path / "stop_here.py").write_text(MODULE)
    terminal = local(80, tmp_path, "--model", "stop_here.Stop", "--ranks", "2")
    assert terminal.wait() == 1
    shown = "".join(terminal.screen())
    assert "Traceback" not in shown and "this one has 2; use: " in shown
    assert re.search(r"launch/local\.py --config \S+/config\.yaml$", shown)
