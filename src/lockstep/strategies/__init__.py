"""How ranks train together: DDP, or DeepSpeed ZeRO."""

from lockstep.strategies.base import LockstepStrategy, ResumePoint, keep_state_dtypes
from lockstep.strategies.deepspeed import DeepSpeed
from lockstep.strategies.deepspeed_nvme import private_folder
from lockstep.strategies.deepspeed_ops import load_ops, required_ops
from lockstep.strategies.factory import AnyStrategy, make_strategy, preload
from lockstep.strategies.sharded_state import ShardedState
