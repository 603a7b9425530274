"""Connect the ranks of a run: fork them, start the process group, receive signals, and agree when to stop."""

from lockstep.distributed.consensus import StopConsensus
from lockstep.distributed.process_group import (
    WorldEnvironment,
    all_gather,
    broadcast,
    broadcast_from_rank_zero,
    destroy_process_group,
    enable_flight_recorder,
    init_process_group,
    local_devices,
)
from lockstep.distributed.ranks import RankFailed, fork_ranks
from lockstep.distributed.signals import STOP_SIGNALS, SignalReceiver, allocation_end_time
