"""Split a command line into its command, keys and values."""

import re
from collections.abc import Sequence

from lockstep.config.messages import expected_mapping
from lockstep.config.schema import COMMANDS
from lockstep.config.yaml_files import dump_yaml, read_config_file
from lockstep.core import UsageError, did_you_mean


class MissingValue(UsageError):
    """A key without a value; ``key`` may not exist."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key}: needs a value: --{key} VALUE.")
        self.key = key


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command at the start of ``arguments``, fit by default, and the other arguments."""
    if not arguments or arguments[0].startswith("-"):
        return "fit", list(arguments)
    if re.match(r"\w+([.]\w+)*=", arguments[0]):
        raise UsageError(f"{arguments[0]!r} has no dashes; write --{arguments[0]}.")
    if arguments[0] not in COMMANDS:
        raise UsageError(f"{arguments[0]!r} is not a command{did_you_mean(arguments[0], COMMANDS)}")
    return arguments[0], list(arguments[1:])


def check_not_local(arguments: Sequence[str]) -> None:
    """Raise UsageError if the arguments of ``lockstep train`` have a flag of ``lockstep local``."""
    for flag in (argument.partition("=")[0] for argument in arguments):
        if flag in ("--ranks", "--nodes", "--resume"):
            raise UsageError(
                f"{flag}: is a flag of lockstep local, which starts several ranks and resumes; train is a single rank: set the "
                "number of ranks with the flags of torchrun or srun."
            )


def split_keys(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of a key, without its dashes, and its value; raise UsageError for anything else."""
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "-h":
            argument = "--help"
        if not _is_flag(argument) or argument == "--":
            if re.match(r"\w+([.]\w+)*=", argument):
                raise UsageError(f"{argument!r} has no dashes; write --{argument}.")
            raise UsageError(
                f"{argument!r} is not a key: keys begin with --; a command ({', '.join(COMMANDS)}) must be the first argument."
            )
        key, equals, value = argument[2:].partition("=")
        if not equals and key != "help":
            if rest and not _is_flag(rest[0]) and not re.fullmatch(r"-[a-zA-Z]\S*", rest[0]):
                value = rest.pop(0)
            elif key != "print_config" and not key.endswith(".help"):
                raise MissingValue(key)
        pairs.append((key, value))
    return pairs


def select_section(arguments: Sequence[str], command: str) -> list[str]:
    """Replace config files with sections for commands, as LightningCLI accepts them, by their content for ``command``."""
    selected: list[str] = []
    for argument in arguments:
        if selected[-1:] == ["--config"]:
            argument = f"{selected.pop()}={argument}"
        if argument.startswith("--config="):
            selected += [f"--config={part}" for part in _parts_for(command, argument.partition("=")[2])]
        else:
            selected.append(argument)
    return selected


def _parts_for(command: str, source: str) -> list[str]:
    """The config file ``source``; if it has sections, YAML of what it sets for all commands and for ``command``."""
    content = read_config_file(source)
    if not content.keys() & set(COMMANDS):
        return [source]
    section = content.get(command, {})
    if not isinstance(section, dict):
        raise UsageError(expected_mapping(f"config: {source}: {command}", section))
    common = {key: value for key, value in content.items() if key not in COMMANDS}
    return [dump_yaml(part) for part in (common, section) if part]


def _is_flag(argument: str) -> bool:
    return argument.startswith("--") and " " not in argument.partition("=")[0]
