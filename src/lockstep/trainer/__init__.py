"""Build a Lightning Trainer from a config and run one attempt on one rank."""

from lockstep.trainer.activation_checkpointing import ActivationCheckpointing
from lockstep.trainer.config_parser import instantiate, parse_config, set_optimizer
