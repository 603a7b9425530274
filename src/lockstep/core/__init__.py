"""The basics of every room: errors, atomic file writes, World, logging, terminals, credentials and command-line parsing."""

from lockstep.core.caches import use_writable_caches
from lockstep.core.command_line import (
    CommandLineParser,
    int_at_least,
    is_on_path,
    python_command,
    python_path,
    shell_command,
)
from lockstep.core.credentials import WANDB_KEY_ADVICE, is_secret, wandb_api_key
from lockstep.core.errors import (
    SIGNAL_EXIT_STATUSES,
    FinalTestError,
    Interrupted,
    LockstepError,
    PeerError,
    RunError,
    SaveError,
    Stopped,
    StorageError,
    Superseded,
    UsageError,
    did_you_mean,
    file_error,
    may_pass,
)
from lockstep.core.files import atomic_write, atomic_write_json, atomic_write_text, fsync, read_json
from lockstep.core.imports import fast_imports
from lockstep.core.logging import setup_logging
from lockstep.core.terminal import LiveLine, clear_line, is_terminal
from lockstep.core.text import count, format_bytes
from lockstep.core.world import World
