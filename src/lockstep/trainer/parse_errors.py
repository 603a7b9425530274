"""Explain the jsonargparse errors that static validation cannot find: those about classes that only an import shows."""

import importlib
import re

from jsonargparse import ArgumentParser

from lockstep.config import messages


def explain_parse_error(text: str) -> str:
    """Reduce the message of a jsonargparse ArgumentError to one sentence: the key, its class and the innermost cause.

    jsonargparse names each key and class on the way in an indented block of its own.
    """
    key, owner, cause = "", "", text
    while True:
        if found := re.match(r'\s*Parser key "([^"]+)":', cause):
            key, cause = f"{key}.{found[1]}".lstrip("."), cause[found.end() :]
        elif found := re.search(r"^( *)- Problem with given class_path '([^']+)':\n((?:\1 .*\n?)+)", cause, re.MULTILINE):
            owner, cause = found[2], found[3]
        else:
            break
    if owner and (unknown := re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: --([^\s=]+)", cause)):
        return messages.unknown_key(f"{key}.{unknown[1] or unknown[2]}", "", _argument_keys(key, owner), owner)
    if owner and (missing := re.search(r"following arguments are required: ([^\s,]+)", cause)):
        return messages.missing_key(f"{key}.{missing[1]}", owner)
    cause = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", cause).replace("NoneType", "null")
    lines = [re.sub("^Expected an? ", "expected ", line.strip(" -")) for line in cause.splitlines()]
    causes = [line for line in lines if line and not re.match("Does not validate|Subtypes:|Errors:|Given value type:", line)]
    where = f"{key} ({owner})" if owner else key
    return ": ".join(filter(None, [where, "; ".join(dict.fromkeys(causes))]))


def _argument_keys(key: str, class_path: str) -> list[str]:
    """Keys of the arguments of a class or function, as jsonargparse finds them."""
    module, _, name = class_path.rpartition(".")
    found, parser = getattr(importlib.import_module(module), name), ArgumentParser()
    add = parser.add_class_arguments if isinstance(found, type) else parser.add_function_arguments
    add(found, key, fail_untyped=False)
    return list(parser.get_defaults().keys())
