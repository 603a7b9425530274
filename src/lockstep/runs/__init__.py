"""The run folder: its layout, the records in it, the code snapshot, and how a run ended."""

from lockstep.runs.attempts import Attempt, append_attempt, read_attempts, record_earlier_attempts
from lockstep.runs.endings import LOST_AGENT, OVER_MEMORY, TERMINAL_STATES, Ending, Evidence, JobState, classify_ending
from lockstep.runs.failure import (
    Failure,
    host_name,
    is_connection_loss,
    read_first_failure,
    record_failure,
    signal_name,
    write_failed_result,
    write_trained_result,
)
from lockstep.runs.finished import nothing_left
from lockstep.runs.metrics import METRICS_ROW, read_metrics
from lockstep.runs.origin import git_state, lockstep_state, typed_command
from lockstep.runs.ownership import OWNER_SECONDS, Ownership, claim_heartbeat
from lockstep.runs.records import (
    AttemptStart,
    Durations,
    GitState,
    LaunchRecord,
    Owner,
    RunProgress,
    RunResult,
    SoftwareState,
    SweepRun,
    iso_time,
)
from lockstep.runs.run import Run, checkpoint_order, describe_run, new_run_id, report_phase, update_status
from lockstep.runs.snapshot import CodePaths, verify_snapshot
