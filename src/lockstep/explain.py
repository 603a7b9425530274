"""One clear sentence out of what jsonargparse says about a wrong key or value."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import yaml

import lockstep.data
from lockstep.nearest import did_you_mean

OWNED = {
    "strategy": "set strategy (ddp) and its options (ddp.*) at the top level",
    "devices": "the launcher decides it (launch/local.py --ranks)",
    "num_nodes": "the launcher decides it (launch/local.py --nodes)",
    "use_distributed_sampler": "the order and sharding of the data are lockstep's",
    "default_root_dir": "everything goes into the run folder; set run.root",
    "barebones": "it would train without logs and checkpoints",
}
"""Arguments of lightning's Trainer that are not for a config, and what to do instead."""


def explain(text: str, keys: Sequence[str], arguments: Sequence[str]) -> str:
    """The sentence: which key, which value, and what would be valid.

    Args:
        text: What jsonargparse says.
        keys: All keys that the parser knows by itself.
        arguments: What was typed; with the config files that it names, the source of the values.
    """
    if sentence := _damaged_file(arguments):
        return sentence
    if unknown := re.search(r"[uU]nrecognized arguments: (\S+)", text):
        if not unknown[1].startswith("--"):
            return f"{unknown[1]!r} is no key: keys begin with --, a command (fit, validate, test) stands before them."
        return _unknown_key(unknown[1][2:].partition("=")[0], keys, arguments)
    if unknown := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return _unknown_key(f"{unknown[1]}.{unknown[2]}", keys, arguments)
    if missing := re.search(r'(?:Key "([^"]+)" is required|following arguments are required: --(\S+))', text):
        return f"{missing[1] or missing[2]}: must be set; a --config file usually does it, such as configs/digits.yaml."
    path, owner, leaf = _narrow(text)
    key = ".".join(path)
    value = _given(key, arguments) or _first(r"Got value: (.*)", leaf) or _first(r"Given value: (.*)", leaf)
    if unknown := re.search(r"Option '([^']+)' is not accepted", leaf):
        if not owner:
            return _unknown_key(unknown[1], keys, arguments)
        valid = [f"{key}.{name}" for name in arguments_of(owner)]
        return _unknown_key(f"{key}.{unknown[1]}", valid, arguments, owner)
    if missing := re.search(r"following arguments are required: (.+)", leaf):
        return f"{key}.{missing[1]}: must be set; {owner} needs it."
    if base := _first(r"not correspond to a subclass of (\w+)", leaf):
        return f"{key}: {_class_path(value)} is no {base}."
    if problem := _first(r"(No module named .*)", leaf):
        return f"{key}: {owner} does not exist ({problem}); run from the folder that holds your module."
    if module := _first(r"module '(.*)' has no attribute", leaf):
        return f"{key}: {owner} does not exist{did_you_mean(owner, _names_in(module))}"
    if name := _first(r"Expected a dot import path string: (\S+)", leaf):
        return f"{key}: there is no class {name!r}{did_you_mean(name, _known_classes(key))}"
    # The deepest ones are about the value itself; the others are about what it is part of.
    found = re.findall(r"^( *)(?:- )?Expected an? ([^\n]+?)(?:\. Got value.*)?$", leaf, flags=re.MULTILINE)
    if expected := list(dict.fromkeys(kind for indent, kind in found if indent == max(i for i, _ in found))):
        choices = [choice for item in expected for choice in re.findall(r"'([^']+)'", item) if "Literal" in item]
        hint = did_you_mean(value, choices) if choices else "."
        return f"{key}: {value!r} is not valid: expected {' or '.join(map(_type_name, expected))}{hint}"
    return " ".join(text.split())


def arguments_of(class_path: str) -> list[str]:
    """Names of the arguments of a class and of the classes above it that its own ``**kwargs`` go to."""
    module, _, name = class_path.rpartition(".")
    names: list[str] = []
    for cls in inspect.getmro(getattr(importlib.import_module(module), name)):
        if "__init__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
            names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return [name for name in names if name != "self"]


def _narrow(text: str) -> tuple[list[str], str, str]:
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


def _damaged_file(arguments: Sequence[str]) -> str:
    """A sentence about the first config file that is missing or holds no keys."""
    for path in _config_files(arguments):
        if path.is_dir():
            return f"config: {path} is a folder, not a file."
        if not path.is_file():
            return f"config: there is no file {path}{did_you_mean(path.name, (p.name for p in path.parent.glob('*.yaml')))}"
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            return f"config: {path} is no valid YAML ({' '.join(str(error).split())})."
        if not isinstance(content, Mapping):
            return f"config: {path} must hold keys with values; it holds {'nothing' if content is None else repr(content)}."
    return ""


def _config_files(arguments: Sequence[str]) -> list[Path]:
    following = [*arguments[1:], ""]
    pairs = zip(arguments, following, strict=True)
    return [Path(b if a == "--config" else a[9:]) for a, b in pairs if a == "--config" or a.startswith("--config=")]


def _given(key: str, arguments: Sequence[str]) -> str:
    """The value of ``key`` as it was typed, or as the last config file has it; empty where neither has it."""
    for argument, following in reversed(list(zip(arguments, [*arguments[1:], ""], strict=True))):
        name, equals, value = argument.partition("=")
        if name.rstrip("+") == f"--{key}":
            return value if equals else following
    for path in reversed(_config_files(arguments)):
        found = yaml.safe_load(path.read_text())
        for part in key.split("."):
            if isinstance(found, Mapping) and part not in found and "init_args" in found:
                found = found["init_args"]
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None:
            return str(found)
    return ""


def _unknown_key(key: str, valid: Iterable[str], arguments: Sequence[str], owner: str = "") -> str:
    value = _given(key, arguments)
    given = f" (value {value})" if value else ""
    first, _, rest = key.partition(".")
    if first == "trainer" and rest in OWNED:
        return f"{key}{given}: is not for a config; {OWNED[rest]}."
    where = f" of {owner}" if owner else ""
    valid = list(valid)
    groups = {name.partition(".")[0] for name in valid}
    if not owner and rest and first not in groups:
        return f"{key}{given}: there is no such key{did_you_mean(first, groups, rest)}"
    return f"{key}{given}: there is no such key{where}{did_you_mean(key, valid)}"


def _known_classes(key: str) -> list[str]:
    """Classes that one would name under ``key``."""
    if key.endswith("callbacks"):
        return list(lightning.pytorch.callbacks.__all__)
    if key != "data":
        return ["lockstep.module.Classifier"] if key == "model" else []
    modules = [f"lockstep.data.{module.name}" for module in pkgutil.iter_modules(lockstep.data.__path__)]
    return [name for module in modules for name in _names_in(module)]


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
