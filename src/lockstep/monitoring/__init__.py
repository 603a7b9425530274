"""Observe a run: throughput, NaN guard, watchdog, status file, CSV and W&B loggers, report."""

from lockstep.monitoring import report
from lockstep.monitoring.classifier_media import ClassifierMedia
from lockstep.monitoring.nan_guard import NanGuard
from lockstep.monitoring.progress import ProgressLine
from lockstep.monitoring.status import StatusReporter
from lockstep.monitoring.stopwatch import Stopwatch
from lockstep.monitoring.throughput import ThroughputMonitor
from lockstep.monitoring.wandb_logger import RunLogger, run_logger, start_run_logger, wandb_mode
from lockstep.monitoring.watchdog import Watchdog, stop_watchdog
