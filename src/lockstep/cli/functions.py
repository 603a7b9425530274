"""The functions of ``import lockstep``, for notebooks and scripts; they return results and raise LockstepError.

A run is trained, evaluated or submitted by the command of that name, in a process of its own.
"""

import csv
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.cli.child import EndedCommand, run_command
from lockstep.config import run_config, with_config
from lockstep.config.validation import shows_only, validate_arguments
from lockstep.core import SIGNAL_EXIT_STATUSES, LockstepError, RunError, UsageError, python_path
from lockstep.runs import Owner, Run, RunResult
from lockstep.slurm import SubmittedJob, find_job

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Config = str | os.PathLike[str] | Mapping[str, Any]
"""A config file, the name of a shipped config, or keys with their values; a later one overrides an earlier one."""

Place = str | os.PathLike[str]
"""A run folder, a ``FinishedRun``, a checkpoint, or the id of a Slurm job."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has finished. It can be used wherever the path of a run folder can.

    Attributes:
        folder: Its run folder.
        result: What ``result.json`` says.
    """

    folder: Path
    result: RunResult

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        return self.result.metrics or {}


def fit(*configs: Config, ranks: int | None = None, nodes: int | None = None, resume: Place | None = None) -> FinishedRun:
    """Train on this machine, and show the output: ``fit("digits", {"model.lr": 0.1}, ranks=2)``.

    Args:
        configs: What to train; the shipped config ``digits`` by default.
        ranks: Ranks on each node; 1 by default, or as many as the run had.
        nodes: Simulated nodes; likewise.
        resume: A run to continue with its own config, from its newest checkpoint.

    Raises:
        UsageError: A key, value or file is wrong.
        RunError: The run failed, or a signal ended it.
        KeyboardInterrupt: Ctrl-C, or an interrupted cell; the run is saved and can be resumed.
    """
    return _run_locally("fit", _arguments(configs), ranks, nodes, None if resume is None else Run.open(_folder(resume)))


def validate(run: Place, *configs: Config, ranks: int | None = None, nodes: int | None = None) -> FinishedRun:
    """Validate the weights of a run, in a new run folder; see ``test``."""
    return _evaluate("validate", run, configs, ranks, nodes)


def test(run: Place, *configs: Config, ranks: int | None = None, nodes: int | None = None) -> FinishedRun:
    """Test the weights of a run, in a new run folder: ``test(run, {"data.root": "/data/new"}).metrics``.

    Args:
        run: A run, whose newest checkpoint is used, or a checkpoint. A checkpoint outside of a run needs a config.
        configs: Override the config of the run.
        ranks, nodes: As for ``fit``.

    Raises:
        UsageError, RunError, KeyboardInterrupt: As ``fit``.
    """
    return _evaluate("test", run, configs, ranks, nodes)


def predict(run: Place, *configs: Config, ranks: int | None = None, nodes: int | None = None) -> FinishedRun:
    """Predict with the weights of a run; ``result.predictions`` is the file, in a new run folder. See ``test``."""
    return _evaluate("predict", run, configs, ranks, nodes)


def submit(
    *configs: Config,
    command: str = "fit",
    nodes: int | str | None = None,
    profile: str | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    then: Sequence[str] = (),
    **flags: Any,
) -> SubmittedJob:
    """Submit a run or a sweep to Slurm: ``submit("imagenet", nodes=4, profile="a100", time="24:00:00")``.

    Args:
        configs: What to train; the shipped config ``digits`` by default.
        command: fit, validate, test or predict.
        nodes: Number of nodes, or a range such as ``2-4``; 1 by default, or as many as the run to resume had.
        profile: Name or file of a profile.
        sweep: Keys of the config and the values of each: one run for each combination.
        then: Commands that follow the training, each as a job after the previous one: ``["test", "export --part network"]``.
            The attribute ``then`` of the result has these jobs.
        flags: Further flags of ``lockstep submit``, such as ``ranks_per_node=4`` or ``resume="runs/digits/<id>"``.

    Raises:
        UsageError: A key, value, file or flag is wrong, or Slurm does not take the job.
    """
    arguments = [f"--{name}={value}" for name, value in (("nodes", nodes), ("profile", profile)) if value is not None]
    for key, values in (sweep or {}).items():
        if isinstance(values, str):  # whose characters would be the values
            raise UsageError(f"sweep: {key}: {values!r} must be a list of values.")
        arguments.append(f"--sweep={key}={','.join(_sweep_text(key, value) for value in values)}")
    arguments += [f"--then={link}" for link in ([then] if isinstance(then, str) else then)]
    for name, value in flags.items():
        if name in ("follow", "check", "dry_run", "plan"):
            raise UsageError(f"{name}: submits no job; use lockstep submit --{name.replace('_', '-')}.")
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is not None and item is not False:
                flag = f"--{name.replace('_', '-')}"
                arguments.append(flag if item is True else f"{flag}={_text(name, item)}")
    ended = run_command(["submit", command, *arguments, *_arguments(configs)])
    if ended.status:
        raise UsageError(ended.error)
    return find_job(ended.stdout.split()[0], os.environ)


def load(run: Place, device: str = "cpu") -> "LightningModule":
    """The module of a run with the weights of its newest checkpoint, or of the checkpoint ``run``, in evaluation mode.

    Its class is imported in this process, from the current folder or ``sys.path``.

    Raises:
        UsageError: The run has no checkpoint, or the module cannot be imported or instantiated.
        RunError: The weights do not fit the module.
    """
    from lockstep.trainer.loading import load_module  # torch and Lightning take seconds to import

    return load_module(_folder(run)).to(device)


def read_result(run: Place) -> RunResult:
    """What ``result.json`` says about the newest attempt of a run; raise UsageError if it has not ended yet."""
    path = Run(_folder(run)).result
    if (result := RunResult.read(path)) is None:
        raise UsageError(f"{path} does not exist or is damaged: the run has not ended yet, or this is not a run folder.")
    return result


def read_metrics(run: Place) -> list[dict[str, float]]:
    """The rows of ``metrics.csv``, in their order: the step, the epoch and the metrics that were logged, by name.

    A row has only what was logged then: ``[(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]``.

    Raises:
        UsageError: The run has no ``metrics.csv``, or it is damaged.
    """
    path = Run(_folder(run)).metrics
    try:
        lines = path.read_text().split("\n")[:-1]  # the last one of a run that is training may be incomplete
        return [{name: _number(text) for name, text in row.items() if text} for row in csv.DictReader(lines)]
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: the run has logged nothing yet, or this is not a run folder.") from None
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(f"{path} is damaged: {' '.join(str(error).split())}.") from None


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


def _folder(run: Place) -> Path:
    """The path of a run or checkpoint, or the run folder of a job."""
    path = Path(run).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\d+(_\d+)?", str(run)):
        raise UsageError(f"{run} does not exist; give a run folder, a checkpoint, or the id of a Slurm job.")
    job = find_job(str(run), os.environ)
    if job.runs > 1:
        raise UsageError(f"{run} is a sweep of {job.runs} runs; give one of them, such as {run}_0.")
    return job.folder


def _evaluate(command: str, run: Place, configs: Sequence[Config], ranks: int | None, nodes: int | None) -> FinishedRun:
    place = _folder(run).absolute()
    own = run_config(place)
    keys = [*_arguments(configs if own is None else [own, *configs]), f"--ckpt_path={place}"]
    return _run_locally(command, keys, ranks, nodes, None)


def _run_locally(command: str, keys: list[str], ranks: int | None, nodes: int | None, resume: Run | None) -> FinishedRun:
    typed = with_config([command, *keys], str(resume.config) if resume is not None else None)
    # Here too, so that an error takes milliseconds: the command imports torch.
    config = validate_arguments(typed, folders=[Path.cwd(), *python_path(os.environ)])["run"]
    flags = {"ranks": ranks, "nodes": nodes, "resume": resume.folder if resume is not None else None}
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    ended = run_command(["local", command, *given, *keys])
    newest = sorted(Path(config["root"], str(config["name"])).absolute().glob("*"), reverse=True)
    run = _claimed_run([resume.folder] if resume is not None else newest, ended.process)
    if run is None and not ended.status:
        run = resume  # it was finished already, so that no attempt started
    result = RunResult.read(run.result) if run is not None else None
    if run is None or result is None or ended.status:
        raise _error(ended, run, result)
    return FinishedRun(run.folder, result)


def _claimed_run(folders: Sequence[Path], process: Owner) -> Run | None:
    """The run that ``process`` owns; the result of any other run is that of an earlier attempt."""
    return next((run for run in map(Run, folders) if Owner.read(run.owner) == process), None)


def _error(ended: EndedCommand, run: Run | None, result: RunResult | None) -> LockstepError:
    """The exception for a failed command."""
    reason = result.reason if result is not None and result.reason else ended.error
    if ended.status == UsageError.exit_status:
        return UsageError(reason)
    if run is None:
        return RunError(f"The run failed before it started: {reason}")
    what = "was ended by" if ended.status in SIGNAL_EXIT_STATUSES else "failed:"
    return RunError(f"The run {run.folder} {what} {reason.rstrip('.')}; lockstep.fit(resume={str(run.folder)!r}) resumes it.")


def _arguments(configs: Sequence[Config]) -> list[str]:
    """Convert ``configs`` into arguments of a command."""
    arguments: list[str] = []
    for config in configs:
        if isinstance(config, Mapping):
            arguments += [f"--{key}={_text(key, value)}" for key, value in _keys(config)]
        else:
            arguments.append(f"--config={os.fspath(config)}")
    if shown := next(filter(shows_only, arguments), None):
        raise UsageError(f"{shown} shows help or a config and trains nothing; give it to lockstep local.")
    sets_model = any(isinstance(config, Mapping) and "model" in dict(_keys(config)) for config in configs)
    is_whole = sets_model and all(isinstance(config, Mapping) for config in configs)
    return ["--config={}", *arguments] if is_whole else arguments  # instead of the default config of a command


def _keys(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values; the value of a group, such as ``trainer``, may be a mapping of its keys."""
    for key, value in config.items():
        if isinstance(value, Mapping) and "." not in key and "class_path" not in value:
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            yield key, value


def _text(key: str, value: Any) -> str:
    """Convert a value into the text of an argument."""
    plain = _plain(key, value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _sweep_text(key: str, value: Any) -> str:
    text = _text(key, value)
    return json.dumps(text, ensure_ascii=False) if isinstance(value, str) and "," in text else text


def _plain(key: str, value: Any) -> Any:
    """Convert a value into one that YAML has: a class into its import path, a number of numpy into one of Python."""
    if isinstance(value, str):
        return _importable(key, value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral | Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(key, item) for item in value]
    if inspect.isclass(value) or inspect.isfunction(value):
        return _importable(key, f"{value.__module__}.{value.__qualname__}")
    raise UsageError(
        f"{key}: an object of {type(value).__name__} cannot be passed to the ranks, which are other processes; give its class "
        "and arguments: {'class_path': …, 'init_args': {…}}."
    )


def _importable(key: str, path: str) -> str:
    """Return ``path``; raise UsageError if only this process has what it names."""
    if path.startswith("__main__.") or "<locals>" in path:
        name = path.rpartition(".")[2]
        raise UsageError(
            f"{key}: {name} is defined in this notebook or script, which the ranks do not import; write it into a file "
            f"(in a notebook: a cell that begins with %%writefile mine.py) and give 'mine.{name}'."
        )
    return path
