"""Caches where the home folder cannot be written."""

from pathlib import Path

from lockstep.core import use_writable_caches


def test_a_home_that_cannot_be_written_is_named_and_replaced_for_caches(tmp_path: Path) -> None:
    assert use_writable_caches(env := {"HOME": str(tmp_path)}) == "" and env == {"HOME": str(tmp_path)}
    warning = use_writable_caches(env := {"HOME": "/proc/nope", "XDG_CACHE_HOME": ""})
    assert Path(env["MPLCONFIGDIR"]).is_dir() and env["XDG_CACHE_HOME"] == env["MPLCONFIGDIR"]
    assert warning == f"HOME=/proc/nope is not writable: the caches of this run are in {env['MPLCONFIGDIR']} until it ends"
    assert use_writable_caches(env) == ""
