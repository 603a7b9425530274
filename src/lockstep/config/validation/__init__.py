"""Static validation of a config in milliseconds: class sources are parsed, nothing is imported."""

from lockstep.config.validation.validate import shows_only, validate_arguments
