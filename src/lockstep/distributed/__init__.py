"""Fork and watch the ranks of a job, start their process group, receive signals, and agree when to stop."""

from lockstep.distributed.agent import Agent, Plan
from lockstep.distributed.channel import Channel
from lockstep.distributed.consensus import StopConsensus, all_meet
from lockstep.distributed.cpus import share_cpus
from lockstep.distributed.debugger import breakpoints
from lockstep.distributed.gpus import local_devices
from lockstep.distributed.phases import STARTING_PHASES, PhaseBoard, phase_limits
from lockstep.distributed.process_group import (
    WorldEnvironment,
    all_gather,
    broadcast,
    broadcast_from_rank_zero,
    destroy_process_group,
    enable_flight_recorder,
    gather,
    init_process_group,
    new_group,
    scatter,
    write_flight_record,
)
from lockstep.distributed.rank_group import set_process_name
from lockstep.distributed.ranks import RankFailed, fork_ranks
from lockstep.distributed.signals import STOP_SIGNALS, SignalReceiver, allocation_end_time
