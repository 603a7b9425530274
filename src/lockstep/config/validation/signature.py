"""Find the arguments of a class or function as jsonargparse does: its own, and those that its ``**kwargs`` reach."""

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
"""Base classes without arguments of their own."""


_TRANSPARENT_DECORATORS = {"_defaults_from_env_vars", "override", "abstractmethod", "no_type_check"}
"""Decorators of an ``__init__`` that do not change its arguments."""


Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Argument:
    """An argument in its source.

    Attributes:
        name: Its name.
        module: Module in which the names of the annotation are defined.
        annotation: Its type annotation, if any.
        default: Its default; None if the argument is required.
    """

    name: str
    module: ModuleSource
    annotation: ast.expr | None = None
    default: ast.expr | None = None


@dataclass(frozen=True)
class Signature:
    """The arguments of a class or function.

    Attributes:
        arguments: Known arguments by name.
        closed: Whether there are certainly no others.
    """

    arguments: dict[str, Argument] = field(default_factory=dict)
    closed: bool = False


def signature(sources: SourceIndex, found: Definition) -> Signature:
    """Find the arguments of a class, or of a function that returns an instance."""
    if isinstance(found.node, Function) and found.module is not None:
        arguments = _arguments(found.node, found.module)
        closed = not (found.node.decorator_list or found.module.stubbed or _forwards_kwargs(found.node))
        return Signature({argument.name: argument for argument in arguments}, closed)
    by_name: dict[str, Argument] = {}
    passed: set[str] = set()  # by a class to its base
    first = 0
    try:
        for cls, module in class_hierarchy(sources, found):
            if f"{module.name}.{cls.name}" in _BASES_WITHOUT_ARGUMENTS:
                break
            constructor = _constructor(sources, cls, module)
            if constructor is None:
                continue
            arguments, init = constructor
            for argument in arguments[first:]:
                if argument.name not in passed:
                    by_name.setdefault(argument.name, argument)
            if init is None or not _forwards_kwargs(init):
                break
            try:
                first, names = _super_call(init)
            except Undecidable:
                by_name = _stored_kwargs(sources, found, init) | by_name
                break
            passed |= names
    except Undecidable:
        return Signature(_public(by_name), closed=False)
    return Signature(_public(by_name), closed=True)


def _public(arguments: dict[str, Argument]) -> dict[str, Argument]:
    return {name: argument for name, argument in arguments.items() if not name.startswith("_")}


def class_hierarchy(sources: SourceIndex, found: Definition) -> Iterator[tuple[ast.ClassDef, ModuleSource]]:
    """Yield a class and its bases in method resolution order.

    Raises:
        Undecidable: A base cannot be read; raised after the classes before it.
    """
    if not isinstance(found.node, ast.ClassDef) or found.module is None:
        raise Undecidable
    yield found.node, found.module
    bases = _bases(sources, found)
    if len(bases) == 1:
        yield from class_hierarchy(sources, bases[0])
    elif bases:
        for base in _linearize(sources, bases):
            assert isinstance(base.node, ast.ClassDef) and base.module is not None
            yield base.node, base.module


def _bases(sources: SourceIndex, found: Definition) -> list[Definition]:
    assert isinstance(found.node, ast.ClassDef) and found.module is not None
    bases = []
    for base in found.node.bases:
        definition = sources.resolve(found.module, base.value if isinstance(base, ast.Subscript) else base)
        if isinstance(definition.node, ast.ClassDef):
            bases.append(definition)
        elif definition.path not in _BASES_WITHOUT_ARGUMENTS:
            raise Undecidable
    return bases


def _linearize(sources: SourceIndex, bases: list[Definition]) -> list[Definition]:
    """Method resolution order of all classes above one with several bases (C3 linearization)."""

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
    """The arguments of a class's own constructor and its ``__init__``, which a dataclass lacks; None without a constructor."""
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
    positional = [*args.posonlyargs, *args.args]
    defaults = [*[None] * (len(positional) - len(args.defaults)), *args.defaults, *args.kw_defaults]
    pairs = zip([*positional, *args.kwonlyargs], defaults, strict=True)
    return [Argument(arg.arg, module, arg.annotation, default) for arg, default in pairs]


def _forwards_kwargs(function: Function) -> bool:
    """Whether a function uses its ``**kwargs``."""
    if function.args.kwarg is None:
        return False
    name = function.args.kwarg.arg
    return any(isinstance(node, ast.Name) and node.id == name for line in function.body for node in ast.walk(line))


def _super_call(init: Function) -> tuple[int, set[str]]:
    """The number of positional arguments in ``super().__init__(…, **kwargs)``, and the names of the others.

    Raises:
        Undecidable: ``**kwargs`` are used in another way.
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
    """Arguments of the classes and functions that get ``**kwargs`` later, if ``__init__`` only stores them.

    Raises:
        Undecidable: They may be used in another way.
    """
    assert init.args.kwarg is not None
    rest = init.args.kwarg.arg
    nodes = [node for line in init.body for node in ast.walk(line)]
    uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == rest]
    stored = [node.targets[0] for node in nodes if isinstance(node, ast.Assign) and [node.value] == uses]
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
    for call in nodes:
        passed = [k.value for k in call.keywords if k.arg is None] if isinstance(call, ast.Call) else []
        if isinstance(call, ast.Call) and (forwarded := [use for use in uses if use in passed]):
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
