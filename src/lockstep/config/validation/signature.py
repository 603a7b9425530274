"""Which arguments a class or function takes, as jsonargparse finds them: ``__init__``'s, and those that ``**kwargs`` go to."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from lockstep.config.validation.lookup import Definition, SourceIndex
from lockstep.config.validation.source import ModuleSource, Undecidable

_BASES_WITHOUT_ARGUMENTS = {
    "builtins.object",
    "abc.ABC",
    "typing.Generic",
    "typing_extensions.Generic",
    "torch.nn.modules.module.Module",
}
"""Bases without arguments; torch's passes on what it gets."""


_TRANSPARENT_DECORATORS = {"_defaults_from_env_vars", "override", "abstractmethod", "no_type_check"}
"""Decorators of an ``__init__`` that leave its arguments as they are."""


Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Argument:
    """An argument as its source has it.

    Attributes:
        name: Its name.
        module: Where the names in its annotation are known.
        annotation: Its type; None where it has none.
        default: Its default; None where it must be given.
    """

    name: str
    module: ModuleSource
    annotation: ast.expr | None = None
    default: ast.expr | None = None


@dataclass(frozen=True)
class Signature:
    """What can be given.

    Attributes:
        arguments: By name, as far as they are known.
        closed: Whether there are certainly no others.
    """

    arguments: dict[str, Argument] = field(default_factory=dict)
    closed: bool = False


def signature(sources: SourceIndex, found: Definition) -> Signature:
    """What a class, or a function that returns an instance, takes."""
    if isinstance(found.node, Function) and found.module is not None:
        arguments = _arguments(found.node, found.module)
        closed = not (found.node.decorator_list or found.module.stubbed or _forwards_kwargs(found.node))
        return Signature({argument.name: argument for argument in arguments}, closed)
    arguments_by_name: dict[str, Argument] = {}
    taken: set[str] = set()  # given by a class to the one above it
    first = 0
    try:
        for cls, module in class_hierarchy(sources, found):
            if f"{module.name}.{cls.name}" in _BASES_WITHOUT_ARGUMENTS:
                break
            made = _constructor(sources, cls, module)
            if made is None:
                continue
            arguments, init = made
            for argument in arguments[first:]:
                if argument.name not in taken:
                    arguments_by_name.setdefault(argument.name, argument)
            if init is None or not _forwards_kwargs(init):
                return Signature(_public(arguments_by_name), closed=True)
            try:
                first, names = _super_call(init)
            except Undecidable:
                later = _stored_kwargs(sources, found, init)
                return Signature(_public(later | arguments_by_name), closed=True)
            taken |= names
    except Undecidable:
        return Signature(_public(arguments_by_name), closed=False)
    return Signature(_public(arguments_by_name), closed=True)


def _public(arguments: dict[str, Argument]) -> dict[str, Argument]:
    return {name: argument for name, argument in arguments.items() if not name.startswith("_")}


def class_hierarchy(sources: SourceIndex, found: Definition) -> Iterator[tuple[ast.ClassDef, ModuleSource]]:
    """A class and those above it, in the order in which Python looks for a method.

    Raises:
        CannotTell: One of them cannot be read; not before those below it have been given.
    """
    if not isinstance(found.node, ast.ClassDef) or found.module is None:
        raise Undecidable
    yield found.node, found.module
    bases = _bases(sources, found)
    if len(bases) == 1:
        yield from class_hierarchy(sources, bases[0])
    elif bases:
        yield from [
            (node, module)
            for base in _linearize(sources, bases)
            if isinstance(node := base.node, ast.ClassDef) and (module := base.module)
        ]


def _bases(sources: SourceIndex, found: Definition) -> list[Definition]:
    assert isinstance(found.node, ast.ClassDef) and found.module is not None
    bases = []
    for base in found.node.bases:
        there = sources.resolve(found.module, base.value if isinstance(base, ast.Subscript) else base)
        if isinstance(there.node, ast.ClassDef):
            bases.append(there)
        elif there.path not in _BASES_WITHOUT_ARGUMENTS:
            raise Undecidable
    return bases


def _linearize(sources: SourceIndex, bases: list[Definition]) -> list[Definition]:
    """The order of all classes above one with several bases (C3)."""

    def linear(found: Definition) -> list[Definition]:
        above = _bases(sources, found)
        return [found, *(_linearize(sources, above) if above else [])]

    rows = [*(linear(base) for base in bases), list(bases)]
    order: list[Definition] = []
    while rows := [row for row in rows if row]:
        for row in rows:
            head = row[0]
            if not any(head.path == other.path for rest in rows for other in rest[1:]):
                break
        else:
            raise Undecidable
        order.append(head)
        rows = [[item for item in row if item.path != head.path] for row in rows]
    return order


def _constructor(
    sources: SourceIndex, cls: ast.ClassDef, module: ModuleSource
) -> tuple[list[Argument], Function | None] | None:
    """The arguments of a class's own ``__init__`` and that itself, if it is written down; None where it has none."""
    if module.stubbed:
        raise Undecidable
    decorators = [_decorator(sources, node, module) for node in cls.decorator_list]
    if "other" in decorators:
        raise Undecidable
    found = [node for node in cls.body if isinstance(node, Function) and node.name in ("__init__", "__new__")]
    if found:
        init = found[-1]
        if (
            len({node.name for node in found}) > 1
            or init.name != "__init__"
            or any(_last_name(node) not in _TRANSPARENT_DECORATORS for node in init.decorator_list)
        ):
            raise Undecidable
        return _arguments(init, module)[1:], init
    if any(_binds_init(node) for node in cls.body):
        raise Undecidable
    return (_fields(sources, cls, module), None) if "dataclass" in decorators else None


def _binds_init(node: ast.stmt) -> bool:
    if isinstance(node, Function | ast.ClassDef):
        return False
    names = [*ast.walk(node)]
    return any(
        (isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and part.id in ("__init__", "__new__", "__signature__"))
        or (isinstance(part, Function) and part.name in ("__init__", "__new__"))
        for part in names
    )


def _decorator(sources: SourceIndex, node: ast.expr, module: ModuleSource) -> str:
    """``dataclass``; empty for one that changes no arguments; else something else."""
    call = node.func if isinstance(node, ast.Call) else node
    path = sources.resolve(module, call).path
    if path == "dataclasses.dataclass":
        keywords = node.keywords if isinstance(node, ast.Call) else []
        return "other" if any(keyword.arg in ("init", None) for keyword in keywords) else "dataclass"
    return "" if path in ("typing.is_permanent", "typing_extensions.is_permanent") else "other"


def _fields(sources: SourceIndex, cls: ast.ClassDef, module: ModuleSource) -> list[Argument]:
    fields: dict[str, Argument] = {}
    above = [item for item in class_hierarchy(sources, Definition(f"{module.name}.{cls.name}", module, cls))]
    for node, where in reversed(above):
        if "dataclass" not in [_decorator(sources, decorator, where) for decorator in node.decorator_list]:
            continue
        for line in node.body:
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and "ClassVar" not in ast.dump(line.annotation)
            ):
                argument = Argument(line.target.id, where, line.annotation, line.value)
                if isinstance(line.value, ast.Call) and _last_name(line.value) == "field":
                    options = {keyword.arg: keyword.value for keyword in line.value.keywords}
                    if "init" in options or None in options:
                        raise Undecidable
                    if not {"default", "default_factory"} & set(options):
                        argument = replace(argument, default=None)
                fields[argument.name] = argument
    return list(fields.values())


def _arguments(function: Function, module: ModuleSource) -> list[Argument]:
    args = function.args
    placed = [*args.posonlyargs, *args.args]
    defaults = [*[None] * (len(placed) - len(args.defaults)), *args.defaults, *args.kw_defaults]
    pairs = zip([*placed, *args.kwonlyargs], defaults, strict=True)
    return [Argument(arg.arg, module, arg.annotation, default) for arg, default in pairs]


def _forwards_kwargs(function: Function) -> bool:
    """Whether it does something with its ``**kwargs``."""
    if function.args.kwarg is None:
        return False
    name = function.args.kwarg.arg
    return any(isinstance(node, ast.Name) and node.id == name for line in function.body for node in ast.walk(line))


def _super_call(init: Function) -> tuple[int, set[str]]:
    """How many arguments ``super().__init__(…, **kwargs)`` gives by place, and which by name.

    Raises:
        CannotTell: ``**kwargs`` are used in another way.
    """
    assert init.args.kwarg is not None
    rest = init.args.kwarg.arg
    nodes = [node for line in init.body for node in ast.walk(line)]
    uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == rest]
    for call in nodes:
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=[]), attr="__init__")):
                passed = [k.value for k in call.keywords if k.arg is None]
                if len(uses) == 1 and passed == uses:
                    stars = [arg.value for arg in call.args if isinstance(arg, ast.Starred)]
                    own = init.args.vararg.arg if init.args.vararg else None
                    if all(isinstance(star, ast.Name) and star.id == own for star in stars):
                        return len(call.args) - len(stars), {k.arg for k in call.keywords if k.arg is not None}
    raise Undecidable


def _stored_kwargs(sources: SourceIndex, found: Definition, init: Function) -> dict[str, Argument]:
    """The arguments of the classes and functions that get ``**kwargs`` later, where ``__init__`` only keeps them.

    Raises:
        CannotTell: Something else may be done with them.
    """
    assert init.args.kwarg is not None
    rest = init.args.kwarg.arg
    nodes = [node for line in init.body for node in ast.walk(line)]
    uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == rest]
    kept = [node.targets[0] for node in nodes if isinstance(node, ast.Assign) and [node.value] == uses]
    if not kept or not isinstance(kept[0], ast.Attribute):
        raise Undecidable
    arguments: dict[str, Argument] = {}
    for _, module in class_hierarchy(sources, found):
        if f".{kept[0].attr}" in module.text:
            arguments |= _arguments_of_calls(sources, module, kept[0].attr)
    return arguments


def _arguments_of_calls(sources: SourceIndex, module: ModuleSource, kept: str) -> dict[str, Argument]:
    """What all calls with ``**self.kept`` take; CannotTell if anything else is done with it."""
    nodes = list(ast.walk(module.tree))
    uses = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr == kept and isinstance(n.ctx, ast.Load)]
    arguments: dict[str, Argument] = {}
    for call in nodes:
        passed = [k.value for k in call.keywords if k.arg is None] if isinstance(call, ast.Call) else []
        if isinstance(call, ast.Call) and (mine := [use for use in uses if use in passed]):
            uses = [use for use in uses if use not in mine]
            takes = signature(sources, sources.resolve(module, call.func))
            if not takes.closed:
                raise Undecidable
            given = {keyword.arg for keyword in call.keywords}
            arguments |= {name: Argument(name, module) for name in takes.arguments if name not in given}
    if uses:
        raise Undecidable
    return arguments


def _last_name(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
