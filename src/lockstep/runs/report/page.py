"""Write ``report.png`` and ``report.html``; the page needs no other file and no network."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from lockstep.core import atomic_write, atomic_write_text, count, shell_command
from lockstep.runs import Attempt, LaunchRecord, Run, RunProgress, RunResult, iso_time, read_attempts, read_metrics
from lockstep.runs.report.panels import Chart, make_chart
from lockstep.runs.report.picture import draw_picture
from lockstep.runs.report.predictions import Predicted, read_predictions

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }
img { max-width: 100%; height: auto; } h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 1.6em; }
table { border-collapse: collapse; } td, th { padding: .2em .9em .2em 0; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #e4e4e4; } td { overflow-wrap: anywhere; } th { font-weight: 600; white-space: nowrap; }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; font-size: 13px; } .number { text-align: right; }
"""


def write_report(run: Run, folder: Path) -> list[Path]:
    """Write ``report.png`` and ``report.html`` into ``folder``, of a run that trains or has ended, and return their paths.

    Raises:
        OSError: They cannot be written.
    """
    result, progress, attempts = RunResult.read(run.result), RunProgress.read(run.status), read_attempts(run)
    if result is not None and progress is not None and progress.status in ("starting", "training", "trained"):
        result = None  # that of the attempt before
    predictions, problem = _predictions(run)
    chart = make_chart(read_metrics(run.metrics))
    chart.notes.extend(problem)
    restarts = [attempt.saved_step for attempt in attempts if attempt.attempt < run.newest_attempt and attempt.saved_step]
    title = f"{run.name} {run.id}: {_state(result, progress)}"
    picture = draw_picture(title, chart, sorted(set(restarts)), predictions)
    page = _page(run, title, picture, _sections(run, result, progress, attempts, chart, predictions))
    image, document = folder / "report.png", folder / "report.html"
    atomic_write(image, lambda temporary: temporary.write_bytes(picture))
    atomic_write_text(document, page)
    return [image, document]


def _predictions(run: Run) -> tuple[list[Predicted], list[str]]:
    """What ``predict`` has written, and what is wrong with it."""
    try:
        return read_predictions(run.predictions) if run.predictions.exists() else [], []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        return [], [f"{run.predictions.name} is damaged ({' '.join(str(error).split())})"]


def _state(result: RunResult | None, progress: RunProgress | None) -> str:
    """How far the run is, in a few words."""
    if result is not None:
        steps = f", {count(result.global_step, 'step')}" if result.command == "fit" and result.global_step is not None else ""
        return f"{result.command} {result.status}{steps}"
    if progress is None:
        return "not started"
    total = f" of {progress.steps}" if progress.steps else ""
    return f"{progress.status}, step {progress.step}{total}"


def _sections(
    run: Run,
    result: RunResult | None,
    progress: RunProgress | None,
    attempts: Sequence[Attempt],
    chart: Chart,
    predictions: Sequence[Predicted],
) -> dict[str, str]:
    """The tables of the page, by heading, without empty ones."""
    launch = LaunchRecord.read(run.launch)
    metrics = (result.metrics if result is not None else progress.metrics if progress is not None else None) or {}
    seconds = asdict(result.seconds) if result is not None and result.seconds is not None else {}
    whole = seconds.get("total") or 1.0
    parts = {name: f"{value:.1f} s  ({value / whole:.0%})" for name, value in seconds.items() if value}
    tensors = {tensor.name: f"{' × '.join(map(str, tensor.shape))} {tensor.kind}" for tensor in predictions}
    sections = {
        "Run": _table(_facts(run, result, progress, launch)),
        "Metrics": _table({name: _number(value) for name, value in sorted((metrics or chart.scores).items())}),
        "Predictions": _table(tensors),
        "Time": _table(parts),
        "Earlier attempts": _rows(
            ("attempt", "started", "ended", "step", "resumed from", "why it ended"),
            [
                (a.attempt, iso_time(a.started_at), iso_time(a.ended_at), a.step, a.saved_step, a.reason or "it finished")
                for a in attempts
                if a.attempt < run.newest_attempt
            ],
        ),
    }
    return {name: table for name, table in sections.items() if table}


def _facts(run: Run, result: RunResult | None, progress: RunProgress | None, launch: LaunchRecord | None) -> dict[str, object]:
    """What the page says about the run."""
    facts: dict[str, object] = {"folder": run.folder, "status": _state(result, progress)}
    if result is not None:
        facts |= {"reason": result.reason, "test error": result.test_error, "started": result.start, "ended": result.end}
        facts |= {"epochs": result.epochs, "ranks": result.world_size, "host of rank 0": result.host}
        if result.best_score is not None:
            facts[f"best {result.monitor}"] = f"{result.best_score:.6g} at step {result.best_step}"
        facts |= {"checkpoint": result.checkpoint, "weights sha256": result.weights_sha256, "samples": result.samples}
        facts["skipped files"] = result.skipped_files or None
    elif progress is not None:
        left = None if progress.seconds_left is None else f"{progress.seconds_left:.0f} s"
        speed = f"{progress.samples_per_second:.0f}" if progress.samples_per_second else None
        facts |= {"written": iso_time(progress.time), "phase": progress.phase, "time left": left, "samples/s": speed}
        facts |= {"ranks": progress.world_size, "attempt": progress.attempt, "warning": progress.warning}
    if launch is not None:
        facts |= {"command": launch.command, "nodes": launch.nodes, "commit": _commit(launch.git), "Python": launch.python}
        if launch.lockstep is not None:
            facts["lockstep"] = f"{launch.lockstep.version} {_commit(launch.lockstep)}".strip()
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _number(value: float | None) -> str:
    """A metric; JSON has null where it is not finite."""
    return "not finite" if value is None else f"{value:.6g}"


def _commit(state: Any) -> str:
    """The commit of a checkout, and whether it has changes."""
    if state is None or not state.commit:
        return ""
    return f"{state.commit}{' with uncommitted changes' if state.changed else ''}"


def _table(facts: Mapping[str, object]) -> str:
    """A table with one row for each name and value."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    return f"<table>{rows}</table>" if rows else ""


def _rows(header: Iterable[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a header row."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _page(run: Run, title: str, picture: bytes, sections: Mapping[str, str]) -> str:
    config = run.config.read_text(errors="replace") if run.config.is_file() else ""
    image = base64.b64encode(picture).decode()
    body = "".join(f"<h2>{escape(name)}</h2>{table}" for name, table in sections.items())
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>'
        f'<img alt="The metrics of the run over its steps" src="data:image/png;base64,{image}">{body}'
        f"<h2>Config</h2><details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>"
        f"<p>To update it: <code>{escape(shell_command('report', run.folder))}</code></p></body></html>\n"
    )
