"""The run folder: its layout, the records in it, the code snapshot, and how a run ended."""

from lockstep.runs.attempts import Attempt, append_attempt, read_attempts
from lockstep.runs.endings import TERMINAL_STATES, Ending, Evidence, JobState, classify_ending
from lockstep.runs.failure import (
    Failure,
    read_first_failure,
    record_failure,
    signal_name,
    wait_for_first_failure,
    write_failed_result,
)
from lockstep.runs.frozen_config import ConfigFreezer, check_not_ignored
from lockstep.runs.records import AttemptStart, Durations, LaunchRecord, Owner, RunProgress, RunResult
from lockstep.runs.run import Run, git_state, new_run_id, update_status
from lockstep.runs.snapshot import CodePaths, live_code, take_snapshot, verify_snapshot
