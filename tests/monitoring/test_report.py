"""The summary of a run, in this process."""

import pytest

from lockstep.monitoring.report import mean_speed


def test_the_speed_of_a_run_is_that_of_all_its_steps() -> None:
    rows = [
        {"rate/samples_per_second": "100", "rate/data_wait": "0"},
        {"rate/samples_per_second": "", "rate/data_wait": ""},  # a validation
        {"rate/samples_per_second": "300", "rate/data_wait": "1"},
    ]
    # 300 samples in 3 s, and 300 in 1 s, all of it waiting.
    assert mean_speed(rows) == pytest.approx((150, 0.25))
    assert mean_speed(rows[1:2]) is None and mean_speed([{"step": "1"}]) is None
