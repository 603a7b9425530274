"""Explain in one sentence why jsonargparse rejects a config, or why a module of the user cannot be imported."""

import importlib
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

from lockstep.config import messages
from lockstep.core import UsageError
from lockstep.trainer.saved_config import argument_defaults


def explain_parse_error(text: str) -> str:
    """Reduce the message of an ArgumentError to one sentence: the key, its class and the innermost cause."""
    key, owner, names, cause = "", "", "", text
    while True:  # jsonargparse nests an indented block for each key and class
        if found := re.match(r'\s*Parser key "([^"]+)":', cause):
            names, cause = f"{names}.{found[1]}".lstrip("."), cause[found.end() :]
            key = f"{key}.{found[1]}".lstrip(".")
        elif found := re.search(r"^( *)- Problem with given class_path '([^']+)':\n((?:\1 .*\n?|\n)+)", cause, re.MULTILINE):
            owner, names, cause = found[2], "", found[3]
        else:
            break
    if found := re.search(r"Option '([^']+)' is not accepted\. Got value: Namespace\(class_path='([^']+)'", cause):
        return _unknown_argument(key, found[1], found[2])  # of a class that a function returns
    unknown = r"Option '([^']+)' is not accepted|unrecognized arguments: --([^\s=]+)|Unexpected keys: \{'([^']+)'"
    if owner and (found := re.search(unknown, cause)):
        *inner, name = f"{names}.{found[1] or found[2] or found[3]}".lstrip(".").split(".")
        return _unknown_argument(key.removesuffix(f".{names}") if names else key, ".".join([*inner, name]), owner)
    if owner and (found := re.search(r"Group '([^']+)' does not accept option '([^']+)'", cause)):
        return _unknown_argument(key, f"{found[1]}.{found[2]}", owner)
    if owner and (missing := re.search(r"following arguments are required: ([^\s,]+)", cause)):
        return messages.missing_key(f"{key}.{missing[1]}", owner)
    cause = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", cause).replace("NoneType", "null")
    lines = [re.sub("^Expected an? ", "expected ", line.strip(" -")) for line in cause.splitlines()]
    causes = [line for line in lines if line and not re.match("Does not validate|Subtypes:|Errors:|Given value type:", line)]
    where = f"{key} ({owner})" if owner else key
    return ": ".join(filter(None, [where, "; ".join(dict.fromkeys(causes))]))


def _unknown_argument(key: str, unknown: str, class_path: str) -> str:
    """Message about an unknown argument of a class; a dotted name is an argument of the type of its first part."""
    *names, _ = unknown.split(".")
    prefix, owner, valid = ".".join([key, *names]), class_path, list(argument_defaults(class_path))
    if names:
        found: Any = resolve_name(class_path)
        with suppress(NameError, TypeError, LookupError, ValueError, StopIteration):  # annotations that Python cannot resolve
            for name in names:
                hint = _hints(found)[name]
                found = next(part for part in (hint, *get_args(hint)) if isinstance(part, type) and part is not type(None))
            owner, valid = f"{found.__module__}.{found.__qualname__}", list(_hints(found))
            given = signature(found).parameters.values()
            valid = [
                argument.name for argument in given if argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
            ]
    return messages.unknown_key(f"{key}.{unknown}", "", [f"{prefix}.{name}" for name in valid], owner)


def _hints(found: Any) -> dict[str, Any]:
    constructor = found.__init__ if isinstance(found, type) else found  # type: ignore[misc]
    return {**get_type_hints(found), **get_type_hints(constructor)}


def import_modules(config: Mapping[str, Any]) -> None:
    """Import the module of each class in a config.

    Raises:
        UsageError: A module raises an exception; the message names the file and the line.
    """
    for key, path in _class_paths(config, ""):
        module = path.rpartition(".")[0]
        while module:
            try:
                importlib.import_module(module)
                break
            except Exception as error:
                if not (isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")):
                    raise UsageError(f"{key}: {path} cannot be imported: {_place(error)}.") from error
                module = module.rpartition(".")[0]  # of a nested class


def _class_paths(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Key and class path of each class in a config."""
    if isinstance(value, list):
        for item in value:
            yield from _class_paths(item, key)
    elif isinstance(value, Mapping):
        path = value.get("class_path")
        if isinstance(path, str) and re.fullmatch(r"\w+(\.\w+)+", path):
            yield key, path
        for name, item in value.items():
            yield from _class_paths(item, key if name == "init_args" else f"{key}.{name}".lstrip("."))


def _place(error: Exception) -> str:
    """The type and message of an error in a module, and the line of the user's code that caused it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen ")]
    own = [frame for frame in frames if "site-packages" not in frame.filename and Path(__file__).name not in frame.filename]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    hint = "; install it in the environment of the run" if isinstance(error, ModuleNotFoundError) else ""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}{place}{hint}"
