"""Static validation of a config in milliseconds, which parses the sources of classes instead of importing them."""

from lockstep.config.validation.validate import known_keys, shows_only, validate_arguments, validate_sweep
