"""Completion of commands, keys and values in the shell.

eval "$({program} bash)"     # in ~/.bashrc: for lockstep, launch/*.py, and python launch/*.py
{program} zsh > FOLDER/_lockstep     # a folder of $fpath: for lockstep
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import shtab

from lockstep.cli import COMMANDS, jobs, local, submit
from lockstep.config import COMMANDS as TRAINER_COMMANDS
from lockstep.config import SHARED_CLASSES, SHIPPED, describe_files
from lockstep.config.validation import known_keys
from lockstep.core import CommandLineParser
from lockstep.pack.command import make_parser as make_pack_parser
from lockstep.slurm.submission import LINK_COMMANDS

_BASH_VALUES = """
_lockstep_config_files() {{ compgen -W "{configs}" -- "$1"; compgen -f -- "$1"; }}
_lockstep_links() {{ compgen -W "{links}" -- "$1"; }}
_lockstep_profile_files() {{ compgen -W "{profiles}" -- "$1"; compgen -f -- "$1"; }}
"""
"""Functions that complete a value; shtab completes file names with a function that has ``files`` in its name."""

_BASH_SCRIPTS = """
# "python launch/local.py ..." is completed like "lockstep local ...".
[[ $(complete -p python 2>/dev/null) =~ -F\\ ([^ ]+) && ${BASH_REMATCH[1]} != _lockstep_script ]] &&
  _lockstep_python=${BASH_REMATCH[1]}
_lockstep_script() {
  local i command
  for ((i = 0; i < COMP_CWORD; i++)); do
    case ${COMP_WORDS[i]} in
      local.py | */local.py) command=local ;;
      slurm.py | */slurm.py) command=submit ;;
      jobs.py | */jobs.py) command=jobs ;;
      lockstep.cli) command=${COMP_WORDS[++i]} ;;
      *) continue ;;
    esac
    COMP_WORDS=(lockstep "$command" "${COMP_WORDS[@]:i+1}")
    COMP_CWORD=$((COMP_CWORD - i + 1))
    _shtab_lockstep
    return
  done
  [[ -z $_lockstep_python ]] || "$_lockstep_python" "$@"
}
complete -o default -o bashdefault -F _lockstep_script python python3 local.py slurm.py jobs.py
"""


def main(arguments: Sequence[str], program: str = "lockstep completion") -> int:
    """Print a completion script and return 0."""
    parser = CommandLineParser(
        prog=program,
        description=(__doc__ or "").format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    try:
        print(script(parser.parse_args(arguments).shell), flush=True)
    except BrokenPipeError:  # … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def script(shell: str) -> str:
    """The completion script for ``bash`` or ``zsh``."""
    parser = argparse.ArgumentParser(prog="lockstep")
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers()
    parents = {"local": local.make_parser("local"), "submit": submit.make_parser("submit")}
    parents |= {"plan": parents["submit"]}
    known = {**parents, "pack": make_pack_parser("pack")}
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, parents=[known[name]] if name in known else [], add_help=False)
        if name in (*parents, "train"):
            _add_keys(command)
        elif name == "jobs":
            jobs.add_commands(command)
        elif name == "completion":
            command.add_argument("shell", choices=("bash", "zsh"))
        elif name in ("export", "report", "sync"):
            _complete(command.add_argument("run"), shtab.DIRECTORY)
    for action in (action for command in commands.choices.values() for action in command._actions):
        if action.metavar in ("RUN", "SRC", "OUT"):
            _complete(action, shtab.DIRECTORY)
        elif "--then" in action.option_strings:
            _complete(action, {"bash": "_lockstep_links", "zsh": f"({' '.join(LINK_COMMANDS)})"})
        elif "--profile" in action.option_strings:
            _complete(action, {"bash": "_lockstep_profile_files", "zsh": "_files"})
    if shell == "zsh":
        return shtab.complete(parser, "zsh")
    configs, profiles = (" ".join(describe_files(folder)) for folder in (SHIPPED, SHIPPED / "cluster"))
    values = _BASH_VALUES.format(configs=configs, profiles=profiles, links=" ".join(LINK_COMMANDS))
    return shtab.complete(parser, "bash", preamble=values) + _BASH_SCRIPTS


def _add_keys(parser: argparse.ArgumentParser) -> None:
    """Add all keys of a config, and the commands of the trainer."""
    parser.add_argument("fit", nargs="?", choices=TRAINER_COMMANDS)
    _complete(parser.add_argument("--config"), {"bash": "_lockstep_config_files", "zsh": "_files"})
    for name in ("print_config", "trainer.help", "model.help", "data.help"):
        parser.add_argument(f"--{name}", action="store_true")
    for name, expected in known_keys().items():
        choices = [str(choice) for choice in expected.choices] + ["true", "false"] * ("bool" in expected.simple)
        action = parser.add_argument(f"--{name}", choices=SHARED_CLASSES.get(name) or choices or None)
        if not action.choices and ("Path" in expected.simple or name == "ckpt_path"):
            _complete(action, shtab.FILE)


def _complete(action: argparse.Action, how: Mapping[str, Any]) -> None:
    action.complete = how  # type: ignore[attr-defined]
