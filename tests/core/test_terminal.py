"""The progress line on a real terminal, in this process and in forks that print."""

import sys
from pathlib import Path

import pytest
from support.terminal import Terminal

from lockstep.core.terminal import LiveLine, fold


def test_a_line_breaks_between_metrics_but_not_within_a_command() -> None:
    line = "10:52:59 epoch 1/5  train/loss 1.523  val/loss 1.087"
    assert fold(line, 80, 9) == line
    assert fold(line, 40, 9) == "10:52:59 epoch 1/5  train/loss 1.523\n         val/loss 1.087"
    command = "lockstep sync runs/digits/20261127-105256-d8c4"
    assert fold(f"weights  W&B: {command}", 20, 2) == f"weights\n  W&B: {command}"


@pytest.mark.parametrize("columns", [20, 80])
def test_what_is_printed_stays_above_the_line(tmp_path: Path, columns: int) -> None:
    def main() -> int:
        line = LiveLine()
        line.open()
        line.show(["step 1", "2:00 left", "loss 0.25", "accuracy 0.5"])
        print("to standard output")
        line.show(["step 2", "1:00 left"])
        print("a part,", end="")
        line.show(["never over a part"])
        print(" and the rest")
        sys.stderr.writelines(["to standard error\n"])
        line.show(["step 3"])
        line.close()
        print("the end")
        return 0

    terminal = Terminal(main, columns, tmp_path)
    assert terminal.wait() == 0
    assert terminal.screen() == ["to standard output", "a part, and the rest"[:columns], "to standard error", "the end", ""]
    shown = "step 1  2:00 left" if columns == 20 else "step 1  2:00 left  loss 0.25  accuracy 0.5"
    assert f"\r{shown}\x1b[K\r" in terminal.raw


def test_a_stream_that_is_not_a_terminal_stays_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    line, before = LiveLine(), (sys.stdout, sys.stderr)
    line.open()
    assert (sys.stdout, sys.stderr) == before
    line.close()
