"""Jobs on Slurm: query and follow them, restart or requeue them, and run the task of one node."""

from lockstep.slurm.accounting import accounted_states
from lockstep.slurm.client import (
    QUEUED_SCRIPTS,
    RUNNING_JOBS,
    STATES_OF_JOB,
    Partition,
    check_slurm_conf,
    has_command,
    is_owner_alive,
    is_unanswered,
    is_unknown_job,
    lacks_nodes,
    parse_node_states,
    parse_rejection,
    parse_scripts,
    query_partitions,
    query_slurm,
    start_query,
)
from lockstep.slurm.dependencies import Condition, Dependency
from lockstep.slurm.follow import follow
from lockstep.slurm.registry import SubmittedJob, find_job, member_runs, register_job, registered_jobs, state_folder
from lockstep.slurm.restart_policy import ALREADY_FINISHED, ASK_AGAIN, REQUEUE, RESTART
from lockstep.slurm.restarts import restart_in_allocation
from lockstep.slurm.status import RunStatus, mark_cancelled, query_status
from lockstep.slurm.task import NodeTask
