"""What there is to do for a finished run that is resumed: at each door, without torch."""

from pathlib import Path

import pytest

import lockstep
from lockstep.cli import local
from lockstep.config import with_config
from lockstep.config.validation import validate_arguments
from lockstep.core import UsageError
from lockstep.runs import Owner, Run, RunResult, nothing_left
from lockstep.slurm.submission import LaunchOptions, Profile, Submission

FINISHED = RunResult("finished", "fit", 1, 1, global_step=60, epochs=3)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run of three epochs."""
    made, _ = Run.start(tmp_path, "x", ["test"], 1, 1)
    config = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()
    made.config.write_text(config.replace("max_epochs: 20", "max_epochs: 3"))
    FINISHED.write(made.result)
    return made


@pytest.mark.parametrize(
    ("result", "keys", "said"),
    [
        (
            FINISHED,
            "",
            "is finished (60 steps, 3 epochs), so there is nothing to do; to train on, raise trainer.max_epochs (3).",
        ),
        (FINISHED, "--trainer.max_epochs=2", "to train on, raise trainer.max_epochs (2)."),
        (FINISHED, "--trainer.max_steps=60 --trainer.max_epochs=9", "to train on, raise trainer.max_steps (60)."),
        (FINISHED, "--trainer.max_epochs=4", None),
        (FINISHED, "--trainer.max_epochs=-1 --trainer.max_steps=61", None),
        (RunResult("finished", global_step=40, epochs=2), "", "to train on, change what has ended it."),  # EarlyStopping
        (RunResult("finished", global_step=40, epochs=2), "--model.lr=0.1", None),
        (RunResult("finished", global_step=60, epochs=3, test_error="ValueError"), "", None),
        (RunResult("interrupted", global_step=60, epochs=3), "", None),
    ],
)
def test_a_finished_run_trains_on_if_its_limits_are_raised(run: Run, result: RunResult, keys: str, said: str | None) -> None:
    result.write(run.result)
    arguments = with_config(keys.split(), str(run.config))
    why = nothing_left(run, validate_arguments(arguments))
    assert (why or "").endswith(said or "") and (why is None) == (said is None)
    options = LaunchOptions(run.folder, resume=run)
    if said is None:
        assert Submission.create(arguments, Profile(), options, {}).folder == run.folder
    else:
        with pytest.raises(UsageError, match=r"^--resume: .* is finished"):
            Submission.create(arguments, Profile(), options, {})


def test_a_finished_run_is_not_tested_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = run.result.read_bytes()
    assert local.main(["--resume", str(run.folder)]) == 0
    assert capsys.readouterr().err.startswith(
        f"lockstep: {run.folder} is finished (60 steps, 3 epochs), so there is nothing to"
    )
    assert lockstep.fit(resume=run.folder) == lockstep.FinishedRun(run.folder, FINISHED)
    assert (run.result.read_bytes(), run.newest_attempt, run.owner_of(1)) == (before, 1, Owner.this_process())
