"""Write, find and read checkpoints, decide when to save, and export weights."""

from lockstep.checkpoint.callback import CheckpointCallback
from lockstep.checkpoint.hyper_parameters import HyperParameters
from lockstep.checkpoint.manifest import Manifest, Progress
from lockstep.checkpoint.rank_state import restore_state, undo_changes
from lockstep.checkpoint.reader import Checkpoint, find_checkpoint, latest_checkpoint, read_checkpoint
from lockstep.checkpoint.restored_weights import RestoredWeights
from lockstep.checkpoint.serialization import allow_numpy_globals, allow_plain_classes
from lockstep.checkpoint.writer import CheckpointWriter
