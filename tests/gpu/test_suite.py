"""The rows on a GPU, where there is one; then the harness itself, on rows that fail, hang and crash."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import REPO

from gpu.harness import Line, Place, Row, Suite
from gpu.suite import ROWS, has_gpu

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}


@pytest.mark.skipif(
    not any(Path("/dev").glob("nvidia[0-9]*")),
    reason="needs a GPU; make gpu lists what would run, and runs it where there is one",
)
@pytest.mark.timeout(600)
def test_all_rows_on_this_gpu(tmp_path: Path) -> None:
    env = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(str(REPO / name) for name in ("src", "tests", "benchmarks"))}
    run = subprocess.run([sys.executable, "-m", "gpu.suite", "--out", str(tmp_path / "gpu.md")], env=env)
    assert run.returncode == 0, (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_the_rows_are_listed() -> None:
    """It needs no torch, and runs nothing."""
    if has_gpu():
        pytest.skip("there is a GPU")
    env = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO / "tests")}
    code = "import sys; sys.modules['torch'] = None; from gpu import suite; sys.exit(suite.main([]))"
    listed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert listed.returncode == 0 and "There is no GPU here. With one, this would run" in listed.stdout
    assert all(row.name in listed.stdout and f"{row.seconds:3} s" in listed.stdout for row in ROWS)


def right(place: Place) -> Iterator[Line]:
    yield Line("a | b", f"on {place.device} in {Path.cwd().name}", True)
    yield Line("speed", "3 images/s")


def fails(place: Place) -> list[Line]:
    print("said before")
    raise ValueError("what went\nwrong")


def hangs(place: Place) -> Iterator[Line]:
    yield Line("before it hangs", "done", True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (place.folder / "pid").write_text(str(child.pid))
    time.sleep(60)


def crashes(place: Place) -> list[Line]:
    print("the last words")
    subprocess.Popen(["sleep", "3"])  # which holds the pipe open
    os._exit(7)


def test_a_row_that_fails_hangs_or_crashes_is_reported_and_stops_no_other(tmp_path: Path) -> None:
    rows = [
        Row("hangs", "a row that hangs", 1, hangs),
        Row("fails", "a row that fails", 5, fails),
        Row("crashes", "a row that crashes", 5, crashes),
        Row("right", "a row that is right", 5, right),
        Row("late", "a row for which no time is left", 99, right),
    ]
    suite = Suite(rows, tmp_path / "rows", tmp_path / "gpu.md", "cpu", 10.5, "A rehearsal.")
    (tmp_path / "rows").mkdir()
    begin = time.monotonic()
    assert suite.run() == 1 and time.monotonic() - begin < 8
    text = suite.table.read_text()
    assert text.startswith("A rehearsal.\n\n| what | result | as expected | s |\n|---|---|---|---|\n")
    for line in (
        "| before it hangs | done | yes | 1 |\n| a row that hangs | not finished after 1 s | **no** |  |",
        "| a row that fails | ValueError: what went wrong | **no** | 0 |",
        "| a row that crashes | ended with exit status 7 | **no** | 0 |",
        "| a \\| b | on cpu in right | yes | 0 |\n| speed | 3 images/s |  |  |",
        "| a row for which no time is left | not run: no time was left | **no** | 0 |",
        "a row that crashes, end of its log:\n\n```text\nthe last words\n```",
    ):
        assert line in text, text
    assert "said before" in text and "Not run yet" not in text
    pid = int((tmp_path / "rows" / "hangs" / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_the_table_is_there_while_rows_run(tmp_path: Path) -> None:
    seen: list[str] = []
    table = tmp_path / "gpu.md"
    rows = [Row("one", "the first", 9, right), Row("two", "the second", 9, lambda place: [Line(table.read_text(), "", True)])]
    (tmp_path / "rows").mkdir()
    suite = Suite(rows, tmp_path / "rows", table, "cpu", 60)
    assert suite.run() == 0
    seen.append(suite.outcomes[1].lines[0].what)
    assert "| a \\| b |" in seen[0] and "Not run yet: the second." in seen[0]
