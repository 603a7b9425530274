"""Write ``docs/configuration.md`` from the sources of the keys: ``PYTHONPATH=tests python -m pages.configuration``."""

import argparse
import ast
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from docstring_parser import parse
from support.runs import REPO

from lockstep.cli import local, submit
from lockstep.config import RESERVED_TRAINER_KEYS, SHARED_CLASSES, Options
from lockstep.config.validation.lookup import Definition, SourceIndex
from lockstep.config.validation.signature import Argument, class_hierarchy, signature
from lockstep.config.validation.source import Undecidable
from lockstep.slurm.submission.profile import PROFILE_FLAGS, Container, Profile
from pages.commands import parser_of

PAGE = REPO / "docs" / "configuration.md"

HEAD = """# Configuration

Every key, with its type, default and meaning. `make pages` generates this page from the sources, and a test compares them.

A key is a line of a YAML file (`--config FILE`, or the name of a shipped config) and a flag of the same name with dots:
`--checkpoint.keep_last 3`. Later files and flags override earlier ones. `model` and `data` take a class by import path
(`--model mine.Line`), and the arguments of that class (`--model.lr 0.01`). A list is extended with `+=`
(`--trainer.callbacks+=EMAWeightAveraging`). `lockstep local --print_config` prints all keys of a run with their values, and
`config.yaml` in a run folder keeps them. An unknown key and a wrong type are refused before anything starts.
"""

TRAINER = """Arguments of Lightning's Trainer, whose documentation says more; null leaves the value to lockstep or Lightning.
Set elsewhere, and refused here: {reserved}."""

PRECISION = ("auto", "`auto` is bf16-mixed on GPUs that support it, else 32-true; or one of Lightning's, such as 16-mixed.")


LONG = 300
"""Characters of a text that is given whole."""


@dataclass(frozen=True)
class Key:
    """A row of the page."""

    name: str
    type: str
    default: str
    help: str


def page() -> str:
    """The page, as Markdown."""
    return HEAD + "".join(f"\n{heading}\n\n{_table(keys)}" for heading, keys in sections().items())


def sections() -> dict[str, list[Key]]:
    """All keys, by the heading (and the text below it) of their section."""
    sources = SourceIndex()
    reserved = ", ".join(f"`trainer.{name}`" for name in sorted(RESERVED_TRAINER_KEYS))
    found = {
        "## The run": list(_dataclass_keys(Options)),
        f"## trainer\n\n{TRAINER.format(reserved=reserved)}": list(_trainer_keys(sources)),
    }
    for path in (*SHARED_CLASSES["model"], "lockstep.models.ConvNet", "lockstep.models.MLP"):
        key = "model" if path in SHARED_CLASSES["model"] else "model.network"
        found[f"## {key}: {path}"] = list(_class_keys(sources, path, f"{key}."))
    shared = list(_class_keys(sources, "lockstep.data.base.ImageData", "data."))
    found["## data: all of lockstep's\n\n`Digits` and `Synthetic` need no `root`."] = shared
    for path in SHARED_CLASSES["data"]:
        found[f"## data: {path}"] = [key for key in _class_keys(sources, path, "data.") if key not in shared]
    found["## Optimizer and schedule of your own module"] = [
        Key(
            "optimizer",
            "class path",
            "null",
            "A torch optimizer for a module without configure_optimizers; its arguments are keys too, such as `optimizer.lr`.",
        ),
        Key("lr_scheduler", "class path", "null", "A torch schedule for `optimizer`; likewise."),
    ]
    found["## Flags of lockstep local"] = list(_flags(parser_of(local.main)))
    found["## Flags of lockstep submit"] = [
        flag for flag in _flags(submit.make_parser("")) if flag.name[2:].replace("-", "_") not in PROFILE_FLAGS
    ]
    found[
        "## Profiles\n\nA profile is a YAML file with these keys. Keys with one text or number, and `exclusive`, `sbatch` "
        "and `srun`, are flags of `lockstep submit` too, with dashes: `--gpus-per-node 8`."
    ] = [
        *(Key(f.name, _type(f.type), _default(getattr(Profile(), f.name)), f.metadata["help"]) for f in fields(Profile)),
        *(
            Key(f"container.{f.name}", _type(f.type), "required" if f.name == "image" else _default(f.default), text)
            for f, text in _documented(Container)
        ),
    ]
    return found


def _table(keys: Iterable[Key]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        cells = [f"`{key.name}`", key.type, f"`{key.default}`" if key.default else "", key.help]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "".join(f"{row}\n" for row in rows)


def _dataclass_keys(cls: type, prefix: str = "") -> Iterator[Key]:
    nested = []
    for field, text in _documented(cls):
        default = getattr(cls(), field.name)
        if is_dataclass(default):
            nested.append((type(default), f"{prefix}{field.name}."))
        else:
            yield Key(f"{prefix}{field.name}", _type(field.type), _default(default), text)
    for inner, name in nested:
        yield from _dataclass_keys(inner, name)


def _documented(cls: Any) -> Iterator[tuple[Any, str]]:
    """Fields of a dataclass, each with its text in the docstring of the class; empty if that has none."""
    texts = _texts(cls.__doc__ or "")
    for field in fields(cls):
        yield field, texts.get(field.name, "")


def _trainer_keys(sources: SourceIndex) -> Iterator[Key]:
    """Arguments of Lightning's Trainer, of each text the first sentence: the rest is about Lightning's own defaults."""
    for key in _class_keys(sources, "lightning.pytorch.trainer.trainer.Trainer", "trainer."):
        name = key.name.removeprefix("trainer.")
        if name == "precision":
            yield Key(key.name, "text", *PRECISION)
        elif name not in RESERVED_TRAINER_KEYS:
            text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", key.help)
            yield Key(key.name, key.type, key.default, re.split(r"(?<=\.)\s(?=[A-Z])", text)[0])


def _class_keys(sources: SourceIndex, path: str, prefix: str) -> Iterator[Key]:
    """Arguments of a class, from its source and that of its bases."""
    found = sources.find(path)
    texts = dict[str, str]()
    for cls in _classes(sources, found):
        for node in (cls, *cls.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in (cls.name, "__init__"):
                texts = _texts(ast.get_docstring(node) or "") | texts
    for name, argument in signature(sources, found).arguments.items():
        if f"{prefix}{name}" != "data.seed":  # is seed_everything
            default = "required" if argument.default is None else _default(_literal(argument.default))
            yield Key(f"{prefix}{name}", _annotation(sources, argument), default, texts.get(name, ""))


def _classes(sources: SourceIndex, found: Definition) -> list[ast.ClassDef]:
    """A class and its bases, up to the first one that cannot be read."""
    classes = list[ast.ClassDef]()
    with suppress(Undecidable):
        for cls, _ in class_hierarchy(sources, found):
            classes.append(cls)
    return classes


def _annotation(sources: SourceIndex, argument: Argument) -> str:
    node = argument.annotation
    if isinstance(node, ast.Name) and node.id[0].isupper() and node.id not in ("Any", "Path"):
        alias = sources.resolve(argument.module, node).node
        node = alias.value if isinstance(alias, ast.Assign) else node
    return "" if node is None else _type(ast.unparse(node))


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "Path":
        return Path(*(ast.literal_eval(part) for part in node.args))
    return ast.literal_eval(node)


def _flags(parser: argparse.ArgumentParser) -> Iterator[Key]:
    for action in parser._actions:  # argparse has no public way to list them
        if action.option_strings and action.dest != "help":
            kind = "" if action.nargs == 0 else str(action.metavar or getattr(action.type, "__name__", "text")).upper()
            yield Key(action.option_strings[-1], kind, "", str(action.help or ""))


def _texts(docstring: str) -> dict[str, str]:
    """Texts of the arguments in a docstring, on one line; of a long one the first sentence."""
    texts = {
        param.arg_name: " ".join((param.description or "").replace("``", "`").split()) for param in parse(docstring).params
    }
    return {name: text if len(text) <= LONG else re.split(r"(?<=\.)\s", text)[0] for name, text in texts.items()}


def _type(kind: Any) -> str:
    """A type, or the source of an annotation, as people write it: choices for a Literal, null for None."""
    text = kind if isinstance(kind, str) else kind.__name__ if isinstance(kind, type) else str(kind)
    return _written(ast.parse(text, mode="eval").body)


def _written(node: ast.expr) -> str:
    match node:
        case ast.Subscript(value=outer, slice=inner):
            parts = [_written(part) for part in (inner.elts if isinstance(inner, ast.Tuple) else [inner])]
            name = _written(outer)
            if name in ("Optional", "Union", "Literal"):
                return " | ".join([*parts, *(["null"] if name == "Optional" else [])])
            return f"{name}[{', '.join(parts)}]"
        case ast.BinOp(left=left, right=right):
            return f"{_written(left)} | {_written(right)}"
        case ast.Constant(value=value):
            return "null" if value is None else "…" if value is ... else str(value)
        case ast.Attribute(attr=name):
            return name
    return {"_LITERAL_WARN": "warn", "_PLUGIN_INPUT": "Plugin"}.get(name := ast.unparse(node), name)


def _default(value: Any) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return str(list(value))
    return str(value)


if __name__ == "__main__":
    PAGE.write_text(page())
