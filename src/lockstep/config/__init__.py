"""What a run config may say: its keys, YAML files, command-line arguments, sweeps, cross-field checks, error messages."""

from lockstep.config.arguments import split_arguments
from lockstep.config.checks import check_checkpoint_path, check_deepspeed, check_nvme_path, check_run_root
from lockstep.config.deepspeed import check_offload, deepspeed_config, missing_nvme_folder
from lockstep.config.messages import (
    class_not_set,
    expected_mapping,
    invalid_key_type,
    missing_class,
    missing_key,
    missing_module,
    missing_value,
    not_a_flag,
    unknown_class_name,
    unknown_key,
    wrong_base_class,
    wrong_value,
)
from lockstep.config.schema import (
    COMMANDS,
    GROUPS,
    RESERVED_TRAINER_KEYS,
    SHARED_CLASSES,
    CheckpointOptions,
    DDPOptions,
    DeepSpeedOptions,
    Options,
    Precision,
    RunOptions,
    WandbOptions,
    check_ranges,
)
from lockstep.config.sweep import SweepPoint, check_sweep_keys, parse_sweep, sweep_points
from lockstep.config.yaml_files import config_files, load_yaml, parse_collection, read_config_file
