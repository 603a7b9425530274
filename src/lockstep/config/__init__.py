"""The config of a run: keys, YAML files, command-line arguments, sweeps, cross-field checks and error messages."""

from lockstep.config import messages
from lockstep.config.arguments import MissingValue, check_not_local, select_section, split_command, split_keys
from lockstep.config.checks import (
    check_archive,
    check_characters,
    check_data,
    check_export_format,
    check_mixing,
    check_nvme_path,
    check_pairs,
    check_ranges,
    check_ranks,
    check_run_root,
    check_secrets,
    check_start,
    check_trainer_classes,
)
from lockstep.config.deepspeed import check_offload, deepspeed_config, missing_nvme_folder
from lockstep.config.home import expand_home
from lockstep.config.schema import (
    COMMANDS,
    FULL_PRECISIONS,
    OPTIMIZERS,
    REFUSED_TRAINER_CLASSES,
    RESERVED_TRAINER_KEYS,
    SHARED_CLASSES,
    CheckpointOptions,
    DDPOptions,
    DeepSpeedOptions,
    Options,
    Precision,
    RunOptions,
    WandbOptions,
)
from lockstep.config.shipped import SHIPPED, describe_files, find_shipped, run_config, with_config
from lockstep.config.sweep import SweepPoint, check_sweep_keys, parse_sweep, sweep_points
from lockstep.config.yaml_files import dump_yaml, load_yaml, parse_collection, read_config_file, typed_text
