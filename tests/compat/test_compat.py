"""A missing private name is reported with its library and the tested version, and a file that W&B cannot read is named."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep.compat import patch, private
from lockstep.compat.wandb import read_history
from lockstep.core import LockstepError


def test_a_name_that_is_there_is_returned_and_replaced() -> None:
    owner = SimpleNamespace(_kept=1)
    patch("lightning", owner, "_kept", 2)
    assert private("lightning", owner, "_kept") == 2


@pytest.mark.parametrize(
    "use", [lambda owner: private("lightning", owner, "_gone"), lambda owner: patch("lightning", owner, "_gone", 1)]
)
def test_a_name_that_is_gone_raises_and_is_not_made(use: object) -> None:
    owner = SimpleNamespace()
    with pytest.raises(
        LockstepError, match=r"lightning 2\.\S+ has no SimpleNamespace\._gone, .* tested with lightning 2\.6\.6"
    ):
        use(owner)  # type: ignore[operator]
    assert not vars(owner)


def test_a_file_that_wandb_cannot_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "run-1.wandb"
    file.touch()
    assert read_history(file, timeout=30) == {} and not caplog.text
    file.write_bytes(b"x" * 100)
    assert read_history(file, timeout=30) == {}
    assert f"W&B cannot read {file} (Error: " in caplog.text and "its rows count as not sent" in caplog.text
