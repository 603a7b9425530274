"""Write, find and read checkpoints, decide when to save, and export weights."""

from lockstep.checkpoint.callback import CheckpointCallback
from lockstep.checkpoint.manifest import Progress
from lockstep.checkpoint.rank_state import restore_state
from lockstep.checkpoint.reader import Checkpoint, ResumePoint, find_checkpoint, latest_checkpoint
from lockstep.checkpoint.serialization import State, allow_numpy_globals
from lockstep.checkpoint.sharded_state import WEIGHT, ShardedState, parameter_names
from lockstep.checkpoint.writer import CheckpointWriter
