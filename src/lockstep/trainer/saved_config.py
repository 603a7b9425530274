"""Write a parsed config as YAML that parses to the same config, and decide when it becomes the config of the run."""

import re
import warnings
from collections.abc import Container, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import Callback, Trainer

from lockstep.config import dump_yaml, load_yaml
from lockstep.core import UsageError, atomic_write_text
from lockstep.monitoring import run_logger
from lockstep.trainer.context import RunContext

_PLAIN_TYPES = (bool, int, float, str, type(None))

_PLACEHOLDER = "Unable to serialize instance "
"""What jsonargparse writes, with a warning, in place of a value that it cannot write."""


class AttemptConfig(Callback):
    """Writes ``config.yaml`` on rank zero: at once for a new run, before the first batch for one that resumes.

    By then the checkpoint and the data are loaded, so a flag that prevents this does not stay in the run. Until then, a
    result that says "finished" remains and is true.

    Attributes:
        content: The new content of the file, on rank zero.
        saved: The content of the file that it replaces; empty for a new run.
    """

    def __init__(self, context: RunContext) -> None:
        self.content: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}
        self._context, self._text, self._is_adopted = context, "", not context.world.is_rank_zero

    def begin(self) -> None:
        """Dump the config, and write it if the run has none yet.

        Raises:
            UsageError: The config cannot be written as YAML that parses to the same config.
            Superseded: A newer attempt has claimed the run.
        """
        if self._context.world.is_rank_zero:
            self._context.ownership.check_now()
            self._text = dump_config(self._context.parser, self._context.config)
            self.content = load_yaml(self._text)
            try:
                self.saved = dict(load_yaml(self._context.run.config.read_text()))
            except (OSError, TypeError, ValueError, yaml.YAMLError):  # there is none, or it is damaged
                self.adopt()

    def adopt(self) -> None:
        """Make this the config of the run, and set aside the result of an earlier attempt that had finished the run."""
        if self._is_adopted:
            return
        run = self._context.run
        self._context.ownership.check_now()
        if self.content != self.saved:  # a restart does not change it
            atomic_write_text(run.config, self._text)
        if (result := run.finished_before(self._context.attempt)) is not None:
            run.result.replace(run.attempt_folder(result.attempts) / run.result.name)
        self._is_adopted = True

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._is_adopted:
            return
        self.adopt()
        if self.saved not in ({}, self.content) and (logger := run_logger(trainer)) is not None:
            logger.show_config(self.content)


def dump_config(parser: ArgumentParser, config: Namespace) -> str:
    """Write the complete config as YAML that parses to the same config.

    A default that YAML has no form for, such as a device or a class, is left out: its class sets it again.

    Raises:
        UsageError: A value that is not a default would parse to another value.
    """
    config = config.clone()
    config.pop("config", None)
    left_out: set[str] = set()
    while True:
        text = _dump(parser, _without_defaults(config, left_out))
        try:
            again = parser.parse_string(text)
            again.pop("config", None)
            different = set(_differences(config, again, ""))
        except ArgumentError as error:
            different = {".".join(re.findall(r'Parser key "([^"]+)"', str(error)))}
        if not different:
            return text
        if different <= left_out:
            raise UsageError(
                f"{min(different)}: this value cannot be saved in config.yaml, from which a run resumes: YAML has no form for "
                "it, or that form parses to another value; annotate the argument with its type, or give another value."
            )
        left_out |= different


def argument_defaults(class_path: str) -> dict[str, Any]:
    """Arguments of a class or function, as jsonargparse finds them, and their defaults."""
    found, parser = resolve_name(class_path), ArgumentParser()
    add = parser.add_class_arguments if isinstance(found, type) else parser.add_function_arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about defaults that are objects
        add(found, fail_untyped=False)
        defaults: dict[str, Any] = vars(parser.get_defaults())
    return defaults


def _without_defaults(value: Any, left_out: Container[str], key: str = "") -> Any:
    """Copy a config without the default arguments of classes that are objects or whose keys are in ``left_out``."""
    if isinstance(value, list):
        return [_without_defaults(item, left_out, key) for item in value]
    if not isinstance(value, Namespace):
        return value
    copy = value.clone()
    for name, item in vars(value).items():
        copy[name] = _without_defaults(item, left_out, _inner(key, name))
    arguments = value.get("init_args")
    if isinstance(value.get("class_path"), str) and isinstance(arguments, Namespace):
        odd = [name for name, item in vars(arguments).items() if _inner(key, name) in left_out or not _is_plain(item)]
        defaults = argument_defaults(value.class_path) if odd else {}
        for name in odd:
            if name in defaults and not any(_differences(arguments[name], defaults[name], name)):
                del copy.init_args[name]
    return copy


def _dump(parser: ArgumentParser, config: Namespace) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about placeholders
            text = str(parser.dump(config, skip_unset=False, skip_validation=True))
    except ValueError as error:
        raise UsageError(f"The config cannot be written as YAML: {' '.join(str(error).split())}.") from None
    if _PLACEHOLDER not in text:
        return text
    return dump_yaml(_without_placeholders(load_yaml(text), config))


def _without_placeholders(content: Any, config: Any) -> Any:
    """Replace each placeholder in the ``content`` of a dump by the text in ``config``, or leave it out."""
    if isinstance(content, dict) and isinstance(config, Namespace | dict):
        pairs = {name: _without_placeholders(item, config[name]) for name, item in content.items()}
        return {name: item for name, item in pairs.items() if not _is_placeholder(item)}
    if isinstance(content, list) and isinstance(config, list | tuple) and len(content) == len(config):
        return [_without_placeholders(item, given) for item, given in zip(content, config, strict=True)]
    return config if _is_placeholder(content) and isinstance(config, str) else content


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_PLACEHOLDER)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Namespace | dict):
        return all(map(_is_plain, (value if isinstance(value, dict) else vars(value)).values()))
    return all(map(_is_plain, value)) if isinstance(value, list) else type(value) in _PLAIN_TYPES or isinstance(value, Path)


def _differences(one: Any, other: Any, key: str) -> Iterator[str]:
    """Keys whose values differ between two configs."""
    if isinstance(one, Namespace | dict) and type(one) is type(other):
        ours, theirs = (value if isinstance(value, dict) else vars(value) for value in (one, other))
        for name in {**ours, **theirs}:
            # A class without arguments may have no init_args.
            one, other = (values.get(name, Namespace()) for values in (ours, theirs))  # type: ignore[no-untyped-call]
            yield from _differences(one, other, _inner(key, name))
    elif isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        for ours, theirs in zip(one, other, strict=True):
            yield from _differences(ours, theirs, key)
    elif one is not other and not (type(one) is type(other) and _shown(one) == _shown(other)):
        yield key


def _inner(key: str, name: str) -> str:
    """The key of an argument, as users write it."""
    return key if name == "init_args" else f"{key}.{name}".lstrip(".")


def _shown(value: Any) -> str:
    """The ``repr`` and the attributes of a value, without addresses: jsonargparse copies defaults."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr((value, getattr(value, "__dict__", None))))
