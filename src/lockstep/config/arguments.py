"""What was given, as flags and as config files, and the sentences about it. No torch is imported here."""

import re
from collections.abc import Sequence

from lockstep.config.messages import missing_value, not_a_flag
from lockstep.core import UsageError


def split_arguments(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Each key, without its dashes, and its value, in their order.

    Raises:
        UsageError: Something is no key, or a key has no value.
    """
    found, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "-h":
            argument = "--help"
        if not _is_flag(argument) or argument == "--":
            raise UsageError(not_a_flag(argument))
        key, equals, value = argument[2:].partition("=")
        alone = not rest or _is_flag(rest[0]) or re.fullmatch(r"-[a-zA-Z]\S*", rest[0]) is not None
        if not equals and key != "help":
            if not alone:
                value = rest.pop(0)
            elif key != "print_config" and not key.endswith(".help"):
                raise UsageError(missing_value(key))
        found.append((key, value))
    return found


def _is_flag(argument: str) -> bool:
    return argument.startswith("--") and " " not in argument.partition("=")[0]
