"""Find the arguments of a class or function as jsonargparse does: its own, and those that its ``**kwargs`` reach."""

import ast
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from lockstep.config.validation.lookup import Definition, SourceIndex
from lockstep.config.validation.source import ModuleSource, Undecidable

_BASES_WITHOUT_ARGUMENTS = {
    "builtins.object",
    "abc.ABC",
    "typing.Generic",
    "typing_extensions.Generic",
    "torch.nn.modules.module.Module",
}

_TRANSPARENT_DECORATORS = {"_defaults_from_env_vars", "override", "abstractmethod", "no_type_check"}
"""Decorators of an ``__init__`` that do not change its arguments."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Argument(NamedTuple):
    """An argument in its source.

    Attributes:
        module: Module in which the names of the annotation are defined.
        default: Its default; None if the argument is required.
    """

    name: str
    module: ModuleSource
    annotation: ast.expr | None = None
    default: ast.expr | None = None


class Signature(NamedTuple):
    """The known arguments of a class or function by name; ``closed`` if there are certainly no others."""

    arguments: Mapping[str, Argument] = MappingProxyType({})
    closed: bool = False


def signature(sources: SourceIndex, found: Definition) -> Signature:
    """Find the arguments of a class, or of a function that returns an instance."""
    if isinstance(found.node, Function) and found.module is not None:
        arguments = _arguments(found.node, found.module)
        closed = not (found.node.decorator_list or found.module.stubbed or _kwargs_uses(found.node))
        return Signature({argument.name: argument for argument in arguments}, closed)
    by_name: dict[str, Argument] = {}
    passed: set[str] = set()  # arguments that a class passes to its base
    first, closed = 0, True
    try:
        for cls, module in class_hierarchy(sources, found):
            if f"{module.name}.{cls.name}" in _BASES_WITHOUT_ARGUMENTS:
                break
            constructor = _constructor(sources, cls, module)
            if constructor is None:
                continue
            arguments, init = constructor
            by_name |= {own.name: own for own in arguments[first:] if own.name not in passed | by_name.keys()}
            uses = _kwargs_uses(init) if init else []
            if not init or not uses:
                break
            try:
                first, names = _super_call(init, uses)
            except Undecidable:
                by_name = _stored_kwargs(sources, found, init, uses) | by_name
                break
            passed |= names
    except Undecidable:
        closed = False
    return Signature({name: argument for name, argument in by_name.items() if not name.startswith("_")}, closed)


def class_hierarchy(sources: SourceIndex, found: Definition) -> Iterator[tuple[ast.ClassDef, ModuleSource]]:
    """Yield a class and its bases in method resolution order (MRO).

    Raises:
        Undecidable: A base cannot be read; raised after the classes before it.
    """
    if not isinstance(found.node, ast.ClassDef) or found.module is None:
        raise Undecidable
    yield found.node, found.module
    bases = []
    for node in found.node.bases:
        base = sources.resolve(found.module, node.value if isinstance(node, ast.Subscript) else node)
        if isinstance(base.node, ast.ClassDef):
            bases.append(base)
        elif base.path not in _BASES_WITHOUT_ARGUMENTS:
            raise Undecidable
    if len(bases) == 1:
        yield from class_hierarchy(sources, bases[0])
        return
    rows = [list(class_hierarchy(sources, base)) for base in bases]
    rows.append([row[0] for row in rows])
    while rows := [row for row in rows if row]:  # C3 linearization
        head = next((row[0] for row in rows if not any(row[0] in other[1:] for other in rows)), None)
        if head is None:
            raise Undecidable
        yield head
        rows = [[item for item in row if item != head] for row in rows]


def _constructor(
    sources: SourceIndex, cls: ast.ClassDef, module: ModuleSource
) -> tuple[list[Argument], Function | None] | None:
    """Return the arguments of a class's own constructor, and its ``__init__`` if it has one; None without a constructor."""
    decorators = [_decorator(sources, node, module) for node in cls.decorator_list]
    own = {name: list(module.bindings_in(cls.body, name)) for name in ("__init__", "__new__", "__signature__")}
    if module.stubbed or "other" in decorators or own["__new__"] or own["__signature__"]:
        raise Undecidable
    if not own["__init__"]:
        return (_fields(sources, cls, module), None) if "dataclass" in decorators else None
    init = own["__init__"][-1]
    if (
        not isinstance(init, Function)
        or init not in cls.body
        or any(_last_name(node) not in _TRANSPARENT_DECORATORS for node in init.decorator_list)
    ):
        raise Undecidable
    return _arguments(init, module)[1:], init


def _decorator(sources: SourceIndex, node: ast.expr, module: ModuleSource) -> str:
    """Return ``dataclass``, an empty string if the decorator does not change arguments, else ``other``."""
    call = node.func if isinstance(node, ast.Call) else node
    path = sources.resolve(module, call).path
    if path == "dataclasses.dataclass":
        keywords = node.keywords if isinstance(node, ast.Call) else []
        return "other" if any(keyword.arg in ("init", None) for keyword in keywords) else "dataclass"
    return "" if path in ("typing.final", "typing_extensions.final") else "other"


def _fields(sources: SourceIndex, cls: ast.ClassDef, module: ModuleSource) -> list[Argument]:
    fields: dict[str, Argument] = {}
    hierarchy = list(class_hierarchy(sources, Definition(f"{module.name}.{cls.name}", module, cls)))
    for node, where in reversed(hierarchy):
        if "dataclass" not in [_decorator(sources, decorator, where) for decorator in node.decorator_list]:
            continue
        for line in node.body:
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                continue
            if "ClassVar" in ast.dump(line.annotation):
                continue
            default = line.value
            if isinstance(default, ast.Call) and _last_name(default) == "field":
                options = {keyword.arg for keyword in default.keywords}
                if options & {"init", None}:
                    raise Undecidable
                if not options & {"default", "default_factory"}:
                    default = None
            fields[line.target.id] = Argument(line.target.id, where, line.annotation, default)
    return list(fields.values())


def _arguments(function: Function, module: ModuleSource) -> list[Argument]:
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [*[None] * (len(positional) - len(args.defaults)), *args.defaults, *args.kw_defaults]
    pairs = zip([*positional, *args.kwonlyargs], defaults, strict=True)
    return [Argument(arg.arg, module, arg.annotation, default) for arg, default in pairs]


def _kwargs_uses(function: Function) -> list[ast.expr]:
    """Expressions in a function that are its ``**kwargs``."""
    if function.args.kwarg is None:
        return []
    name = function.args.kwarg.arg
    return [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == name]


def _super_call(init: Function, uses: list[ast.expr]) -> tuple[int, set[str]]:
    """Number of positional arguments in ``super().__init__(…, **kwargs)``, and names of the others; else raise Undecidable."""
    for node in ast.walk(init):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=[]), attr="__init__"),
                args=args,
                keywords=keywords,
            ) if [keyword.value for keyword in keywords if keyword.arg is None] == uses:
                stars = [arg.value for arg in args if isinstance(arg, ast.Starred)]
                own = init.args.vararg.arg if init.args.vararg else None
                if all(isinstance(star, ast.Name) and star.id == own for star in stars):
                    return len(args) - len(stars), {keyword.arg for keyword in keywords if keyword.arg is not None}
    raise Undecidable


def _stored_kwargs(sources: SourceIndex, found: Definition, init: Function, uses: list[ast.expr]) -> dict[str, Argument]:
    """Arguments of later calls with ``**kwargs``, if ``__init__`` only stores them; raise Undecidable if it does more."""
    stored = [node.targets[0] for node in ast.walk(init) if isinstance(node, ast.Assign) and [node.value] == uses]
    if not stored or not isinstance(stored[0], ast.Attribute):
        raise Undecidable
    arguments: dict[str, Argument] = {}
    for _, module in class_hierarchy(sources, found):
        if f".{stored[0].attr}" in module.text:
            arguments |= _arguments_of_calls(sources, module, stored[0].attr)
    return arguments


def _arguments_of_calls(sources: SourceIndex, module: ModuleSource, attribute: str) -> dict[str, Argument]:
    """Arguments of all calls with ``**self.attribute``; raise Undecidable if it is used in another way."""
    nodes = list(ast.walk(module.tree))
    uses = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr == attribute and isinstance(n.ctx, ast.Load)]
    arguments: dict[str, Argument] = {}
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        forwarded = [keyword.value for keyword in call.keywords if keyword.arg is None and keyword.value in uses]
        if forwarded:
            uses = [use for use in uses if use not in forwarded]
            callee = signature(sources, sources.resolve(module, call.func))
            if not callee.closed:
                raise Undecidable
            given = {keyword.arg for keyword in call.keywords}
            arguments |= {name: Argument(name, module) for name in callee.arguments if name not in given}
    if uses:
        raise Undecidable
    return arguments


def _last_name(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
