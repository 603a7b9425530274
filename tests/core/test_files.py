"""Atomic writes of JSON."""

import math
from pathlib import Path

from lockstep.core import atomic_write_json, read_json


def test_numbers_that_json_lacks_become_null_at_any_depth(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "a.json", {"loss": math.nan, "scores": [1.0, math.inf, {"a": (math.nan, "b")}]})
    assert read_json(tmp_path / "a.json") == {"loss": None, "scores": [1.0, None, {"a": [None, "b"]}]}
