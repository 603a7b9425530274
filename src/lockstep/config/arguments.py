"""Split a command line into its command, keys and values."""

import re
from collections.abc import Sequence

from lockstep.config.messages import missing_value, not_a_flag, unknown_command
from lockstep.config.schema import COMMANDS
from lockstep.core import UsageError


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command at the start of ``arguments``, fit by default, and the other arguments.

    Raises:
        UsageError: The first argument is neither a command nor a key.
    """
    if not arguments or arguments[0].startswith("-"):
        return "fit", list(arguments)
    if arguments[0] not in COMMANDS:
        raise UsageError(unknown_command(arguments[0]))
    return arguments[0], list(arguments[1:])


def split_keys(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of a key, without its dashes, and its value, in their order.

    Raises:
        UsageError: An argument is not a key, or a key has no value.
    """
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "-h":
            argument = "--help"
        if not _is_flag(argument) or argument == "--":
            raise UsageError(not_a_flag(argument))
        key, equals, value = argument[2:].partition("=")
        if not equals and key != "help":
            if rest and not _is_flag(rest[0]) and not re.fullmatch(r"-[a-zA-Z]\S*", rest[0]):
                value = rest.pop(0)
            elif key != "print_config" and not key.endswith(".help"):
                raise UsageError(missing_value(key))
        pairs.append((key, value))
    return pairs


def _is_flag(argument: str) -> bool:
    return argument.startswith("--") and " " not in argument.partition("=")[0]
