"""The report of a run: its panels, then its picture, then its files; without torch."""

import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest

from lockstep import cli
from lockstep.runs import Attempt, LaunchRecord, Owner, Run, RunProgress, RunResult, append_attempt
from lockstep.runs.report.panels import MAX_PANELS, Chart, make_chart
from lockstep.runs.report.picture import make_figure
from lockstep.runs.report.predictions import Predicted, read_predictions


def rows(**columns: list[float]) -> list[dict[str, str]]:
    """Rows of steps 10, 20, …; a dot in a name is written as two underscores, a slash as three."""
    length = max(map(len, columns.values()))
    names = {name: name.replace("___", "/").replace("__", ".") for name in columns}
    return [
        {"step": str(10 * at + 10), "epoch": "0"}
        | {names[name]: str(values[at]) for name, values in columns.items() if at < len(values)}
        for at in range(length)
    ]


FALLING = [2.0, 0.5, 0.2, 0.1, 0.05, 0.02]
RISING = [0.01, 0.3, 0.5, 0.6, 0.7, 0.8]


def test_columns_of_one_quantity_share_a_panel_whatever_the_module_calls_them() -> None:
    chart = make_chart(
        rows(optim___lr=FALLING, train_mse_step=FALLING, train_mse_epoch=FALLING, val_mse=FALLING, mse_test=[0.3, 0.2])
        + rows(valid___f1=RISING, loss___train=RISING, perplexity=FALLING, test___seen=[7.0, 7.0], rate___step_ms=FALLING)
    )
    found = [(panel.title, [curve.label for curve in panel.curves], panel.is_log) for panel in chart.panels]
    assert found == [
        ("loss", ["train"], False),
        ("mse", ["train step", "train epoch", "val"], True),
        ("f1", ["val"], False),
        ("perplexity", ["perplexity"], True),
        ("learning rate", ["optim/lr"], True),
    ]
    assert chart.scores == {"mse_test": 0.2, "test/seen": 7.0} and not chart.notes
    assert [score.name for score in chart.panels[1].scores] == ["mse_test"]


@pytest.mark.parametrize(
    ("values", "is_log"),
    [(FALLING, True), (RISING, False), ([*FALLING, 0.0], False), ([1.0, 0.9, 0.8], False), ([1.0, 1.1, 900.0], True)],
)
def test_a_logarithmic_axis_is_used_where_it_helps(values: list[float], is_log: bool) -> None:
    (panel,) = make_chart(rows(val_loss=values)).panels
    assert panel.is_log == is_log


def test_what_cannot_be_drawn_is_named() -> None:
    bad = rows(nothing=[float("nan"), float("inf")], loss=[1.0, float("nan"), 0.5])
    chart = make_chart([*bad, {"step": "x", "loss": "1"}, {"step": "40", "loss": "damaged"}])
    assert [panel.title for panel in chart.panels] == ["loss"]
    assert chart.notes == ["nothing has no finite value", "not a number in metrics.csv: 2 values"]
    many = make_chart(rows(**{f"m{number}": RISING for number in range(MAX_PANELS + 2)}))
    assert len(many.panels) == MAX_PANELS and many.notes == ["2 more are in metrics.csv: m12, m13"]


def test_an_evaluation_has_scores_and_no_points() -> None:
    chart = make_chart(rows(test___loss=[0.5], rate___step_ms=[1.0]))
    assert chart == Chart([], {"test/loss": 0.5}, [])
    assert not make_figure("x", chart, [], []).axes


def test_no_panel_is_empty_and_no_legend_or_title_covers_a_curve() -> None:
    pytest.importorskip("matplotlib")
    chart = make_chart(
        rows(train_mse_step=FALLING, train_mse_epoch=FALLING, val_mse=FALLING, test_mse=[0.1])
        + rows(val_mae=RISING, slope=RISING, optim___lr=FALLING, a_very_long_name_of_a_metric_that_is_alone=RISING)
    )
    figure = make_figure("x", chart, [20, 40, 1000], [])
    figure.canvas.draw()
    assert len(figure.axes) == len(chart.panels) == 5
    texts = [text.get_window_extent() for text in figure.texts]
    for axes in figure.axes:
        assert axes.lines
        inside = axes.get_window_extent()
        legend = axes.get_legend()
        above = [axes.title, axes._left_title, *([legend] if legend is not None else [])]  # type: ignore[attr-defined]
        boxes = [part.get_window_extent() for part in above if part is legend or part.get_text()]
        for box in boxes:
            assert box.y0 >= inside.y1 - 2 and box.x0 >= 0 and box.x1 <= figure.bbox.x1, axes.get_title("left")
            assert not any(box.overlaps(text) for text in texts)
            assert not any(box.overlaps(other.get_window_extent()) for other in figure.axes if other is not axes)
        assert len([line for line in axes.lines if line.get_linestyle() == "--"]) == 2, "restarts within the steps"
    assert any("resumed from step 20, 40" in text.get_text() for text in figure.texts)


def write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """A safetensors file; of a pair, the first is the name of the type."""
    header, data = {}, b""
    for name, (kind, array) in tensors.items():
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    probabilities = numpy.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], "f4")
    half = (numpy.array([[1.5], [-2.0]], "f4").view("u4") >> 16).astype("u2")
    large = ("I64", numpy.array([[10**9, 10**12]]))  # such as the numbers of samples
    written = {"p": ("F32", probabilities), "half": ("BF16", half), "labels": ("I64", numpy.array([3, 4])), "x": ("F8", half)}
    written |= {"large": large, "empty": ("F32", numpy.zeros((2, 0), "f4"))}
    write_tensors(tmp_path / "x", written)
    p, bf16, labels, unknown, big, empty = read_predictions(tmp_path / "x")
    assert p.are_probabilities and p.values is not None and p.values.argmax(1).tolist() == [0, 1, 1]
    assert bf16.values is not None and bf16.values.tolist() == [[1.5], [-2.0]] and not bf16.are_probabilities
    assert labels.values is not None and labels.values.tolist() == [3, 4]
    assert unknown == Predicted("x", "F8", (2, 1), None)
    assert empty.values is not None and empty.values.shape == (2, 0)
    figure = make_figure("x", Chart([], {}, []), [], [p, bf16, labels, unknown, big, empty])
    assert [axes.get_title("left").partition(":")[0] for axes in figure.axes] == ["p", "p", "half", "labels", "large"]
    assert all(axes.patches for axes in figure.axes)


class Page(HTMLParser):
    """Collects the attributes and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that trains in its second attempt."""
    run = Run.create(tmp_path, "x")
    run.config.write_text("model: {note: <script>alert(1)</script>}\n")
    LaunchRecord("lockstep local --x '<b>'", 1, 1).write(run.launch)
    for _ in range(2):
        run.claim_attempt(Owner(host="a", pid=1))
    append_attempt(run, Attempt(1, "", "rank 0: KeyError: <no>", 1, 0.0, 1.0, 20, 25, True))
    RunResult("failed", attempts=1, reason="Ctrl-C").write(run.result)
    RunProgress("training", step=40, steps=100, metrics={"val/loss": 0.2}, attempt=2).write(run.status)
    run.metrics.write_text("lockstep/row,step,epoch,val/loss\n1,20,0,0.5\n2,40,0,0.25\n3,60,0,0.1234")
    return run


def test_lockstep_report_draws_a_run_that_trains(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run.folder)]) == 0
    image, document = (Path(line) for line in capsys.readouterr().out.splitlines())
    assert (image, document) == (run.folder / "report.png", run.folder / "report.html")
    assert image.read_bytes().startswith(b"\x89PNG")
    page = Page(document.read_text())
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "b", "link"} & set(page.tags)
    for text in ("training, step 40 of 100", "<script>alert(1)</script>", "--x '<b>'", "rank 0: KeyError: <no>", "val/loss0.2"):
        assert text in page.text, text
    assert "Ctrl-C" not in page.text and "http" not in page.text


def test_damage_is_named_in_the_report_and_does_not_stop_it(run: Run, tmp_path: Path) -> None:
    run.predictions.write_bytes(b"\xff" * 20)
    run.metrics.write_bytes(b"step,val/loss\n\xff,\xfe\n")
    for name in ("result.json", "status.json", "launch.yaml", "attempts.jsonl"):
        (run.folder / name).write_bytes(b"\0[")
    run.config.write_bytes(b"\xff")
    assert cli.main(["report", str(run.folder), "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists() and not (run.folder / "report.html").exists()


def test_a_report_that_cannot_be_written_is_one_sentence(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cli.main(["report", str(run.folder)]) == 2
    assert f"--folder: {run.folder} cannot be written; choose another folder." in capsys.readouterr().err
