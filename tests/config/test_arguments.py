"""The config of a command that names a checkpoint."""

from pathlib import Path

import pytest

from lockstep.config import with_config
from lockstep.core.errors import UsageError


def test_an_evaluation_has_the_config_of_the_run_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        (run / "checkpoints" / "step-00000040").mkdir(parents=True)
        (run / "config.yaml").touch()
    one, two = (str(run / "config.yaml") for run in runs)
    checkpoint = runs[0] / "checkpoints" / "step-00000040"
    (checkpoint / "model.ckpt").touch()
    for place in (runs[0], checkpoint, checkpoint / "model.ckpt"):
        for given in (["--ckpt_path", str(place)], [f"--ckpt_path={runs[1]}", f"--ckpt_path={place}"]):
            assert with_config(["test", *given], default=None) == ["test", "--config", one, *given]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert with_config(["test", "--ckpt_path=~/one"]) == ["test", "--config", one, "--ckpt_path=~/one"]
    given = ["predict", f"--ckpt_path={checkpoint}", "--config", "mine.yaml"]
    assert with_config(given) == given
    assert with_config([f"--ckpt_path={checkpoint}"], default=None) == [f"--ckpt_path={checkpoint}"]  # fit
    assert with_config(["test"], checkpoints=[str(checkpoint), str(runs[0])])[2] == one
    with pytest.raises(UsageError, match="the checkpoints belong to different runs"):
        with_config(["test"], checkpoints=[str(checkpoint), str(runs[1])])
    foreign = runs[1] / "checkpoints" / "epoch=1.ckpt"  # beside the config.yaml of LightningCLI
    foreign.touch()
    with pytest.raises(
        UsageError, match=r"epoch=1.ckpt is not in a run folder, so its config is not known; set one with --conf"
    ):
        with_config(["validate", "--ckpt_path", str(foreign)])
    own = ["validate", "--ckpt_path", str(foreign), "--model=mine.Net"]
    assert two not in with_config(own) and with_config(own, default=None) == own


def test_a_long_value_is_not_a_file_name() -> None:
    given = ["test", "--ckpt_path", "a" * 5000]
    assert with_config(given, default=None) == given
