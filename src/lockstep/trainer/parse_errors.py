"""One clear sentence out of what jsonargparse says about a wrong key or value."""

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch.callbacks

from lockstep.config import (
    SHARED_CLASSES,
    config_files,
    missing_class,
    missing_key,
    missing_module,
    missing_value,
    not_a_flag,
    read_config_file,
    unknown_class_name,
    unknown_key,
    wrong_base_class,
    wrong_value,
)
from lockstep.core import UsageError


def explain_parse_error(text: str, keys: Sequence[str], arguments: Sequence[str]) -> str:
    """The sentence: which key, which value, and what would be valid.

    Args:
        text: What jsonargparse says.
        keys: All keys that the parser knows by itself.
        arguments: What was typed; with the config files that it names, the source of the values.
    """
    try:
        for given in config_files(arguments):
            read_config_file(given)
    except UsageError as error:
        return error.message
    if unknown := re.search(r"[uU]nrecognized arguments: (\S+)", text):
        if not unknown[1].startswith("--"):
            return not_a_flag(unknown[1])
        key = unknown[1][2:].partition("=")[0]
        return unknown_key(key, _typed_value(key, arguments), keys)
    if unknown := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        key = f"{unknown[1]}.{unknown[2]}"
        return unknown_key(key, _typed_value(key, arguments), keys)
    if alone := re.search(r"argument --(\S+): expected one argument", text):
        return missing_value(alone[1])
    path, owner, leaf = _innermost_error(text)
    key = ".".join(path)
    value = _typed_value(key, arguments) or _first(r"Got value: (.*)", leaf) or _first(r"Given value: (.*)", leaf)
    if unknown := re.search(r"Option '([^']+)' is not accepted", leaf):
        whole = f"{key}.{unknown[1]}" if owner else unknown[1]
        valid = [f"{key}.{name}" for name in argument_names(owner)] if owner else keys
        return unknown_key(whole, _typed_value(whole, arguments), valid, owner)
    if missing := re.search(r"following arguments are required: (.+)|Key \"([^\"]+)\" is required", leaf):
        names = (missing[1] or missing[2]).replace("--", "").split(", ")
        first = "model" if "model" in names else names[0]
        return missing_key(f"{key}.{first}" if key else first, owner)
    if base := _first(r"not correspond to a subclass of (\w+)", leaf):
        return wrong_base_class(key, _class_path(value), base)
    if problem := _first(r"(No module named .*)", leaf):
        return missing_module(key, owner, problem)
    if module := _first(r"module '(.*)' has no attribute", leaf):
        return missing_class(key, owner, _names_in(module))
    if name := _first(r"Expected a dot import path string: (\S+)", leaf):
        return unknown_class_name(key, name, _known_classes(key))
    # The deepest ones are about the value itself; the others are about what it is part of.
    found = re.findall(r"^( *)(?:- )?Expected an? ([^\n]+?)(?:\. Got value.*)?$", leaf, flags=re.MULTILINE)
    if expected := list(dict.fromkeys(kind for indent, kind in found if indent == max(i for i, _ in found))):
        choices = [choice for item in expected for choice in re.findall(r"'([^']+)'", item) if "Literal" in item]
        return wrong_value(key, value, map(_type_name, expected), choices)
    return " ".join(text.split())


def argument_names(class_path: str) -> list[str]:
    """Names of the arguments of a function, or of a class and of the classes above it that its own ``**kwargs`` go to."""
    module, _, name = class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    above = inspect.getmro(found) if isinstance(found, type) else []
    names: list[str] = []
    for maker in [vars(cls)["__init__"] for cls in above if "__init__" in vars(cls)] or [found]:
        parameters = inspect.signature(maker).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name != "self"]


def _innermost_error(text: str) -> tuple[list[str], str, str]:
    """The key that the error is about, the class that it belongs to, and what is said about it alone.

    Where a value may be one of several things, what is said of the class that was named counts, not of the others.
    """
    path: list[str] = []
    owner = ""
    while True:
        if key := re.match(r'\s*Parser key "([^"]+)":', text):
            path.append(key[1])
            text = text[key.end() :]
        elif problem := re.search(r"^( *)- Problem with given class_path '([^']+)':\n", text, flags=re.MULTILINE):
            owner = problem[2]
            rest = text[problem.end() :]
            end = re.search(rf"^ {{0,{len(problem[1])}}}\S", rest, flags=re.MULTILINE)
            text = rest[: end.start()] if end else rest
        else:
            return path, owner, text


def _typed_value(key: str, arguments: Sequence[str]) -> str:
    """The value of ``key`` as it was typed, or as the last config file has it; empty where neither has it."""
    for argument, following in reversed(list(zip(arguments, [*arguments[1:], ""], strict=False))):
        name, equals, value = argument.partition("=")
        if name.rstrip("+") == f"--{key}":
            return value if equals else following
    for given in reversed(config_files(arguments)):
        found: Any = read_config_file(given)
        for part in key.split("."):
            if isinstance(found, Mapping) and part not in found and "init_args" in found:
                found = found["init_args"]
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None:
            return str(found)
    return ""


def _known_classes(key: str) -> list[str]:
    """Classes that one would name under ``key``."""
    if key.endswith("callbacks"):
        return list(lightning.pytorch.callbacks.__all__)
    return SHARED_CLASSES.get(key, [])


def _names_in(module: str) -> list[str]:
    """Import paths of the classes that a module defines."""
    found = importlib.import_module(module)
    return [f"{module}.{name}" for name, value in vars(found).items() if isinstance(value, type) and value.__module__ == module]


def _class_path(value: str) -> str:
    return _first(r"class_path['\"]?: ['\"]?([\w.]+)", value) or value


def _type_name(text: str) -> str:
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return f"one of {choices[1]}"
    return {"NoneType": "null"}.get(name := re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", text), name)


def _first(pattern: str, text: Any) -> str:
    found = re.search(pattern, str(text), flags=re.MULTILINE)
    return found[1].strip() if found else ""
