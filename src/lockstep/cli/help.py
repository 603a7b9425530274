"""The help of ``local`` and ``submit``: their flags, the keys that only show help or a config, the configs and the profiles."""

import argparse
import shutil
import textwrap

from lockstep.config import SHIPPED, describe_files
from lockstep.core import CommandLineParser, shell_command

_SHOW_ONLY = {
    "--print_config": "the complete config, with all keys",
    "--trainer.help": "keys of Lightning's Trainer; likewise run, checkpoint, ddp, deepspeed, distributed and wandb",
    "--model.help [CLASS]": "arguments of the model, or of another class; likewise data, optimizer and lr_scheduler",
}


class LaunchParser(CommandLineParser):
    """A parser of a launcher's flags, whose help also lists show-only keys, configs, profiles and completion."""

    def __init__(self, program: str, description: str | None, lists_profiles: bool = False) -> None:
        super().__init__(
            prog=program,
            description=(description or "").format(program=program),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._lists_profiles = lists_profiles

    def format_help(self) -> str:
        parts = [_section("show only, about the config", _SHOW_ONLY), _section("configs, by --config NAME", describe_files())]
        if self._lists_profiles:
            parts.append(_section("profiles, by --profile NAME", describe_files(SHIPPED / "cluster")))
        completion = f"completion of commands, keys and values: {shell_command('completion', '--help')}"
        return "\n\n".join([super().format_help().rstrip(), *parts, completion, ""])


def _section(title: str, items: dict[str, str]) -> str:
    """A titled table, as wide as the terminal."""
    width, indent = shutil.get_terminal_size().columns - 2, max(map(len, items)) + 4
    rows = [
        textwrap.fill(text, width, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
        for name, text in items.items()
    ]
    return "\n".join([f"{title}:", *rows])
