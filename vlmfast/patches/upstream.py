"""Tell what a method says, whoever's it is: a digest of its code and of the code that it names.

Two methods have the same digest where they differ at most in comments, docstrings, annotations and layout, whatever
their classes are called. It is the same under every supported Python, whose ``ast.dump`` is not.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

# Methods that replacements call as the replaced body does: what they do is not part of it.
INTERFACE = {"get_input_embeddings"}
_SILENT = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}  # fields that change nothing


@dataclass(frozen=True)
class Text:
    """One function as a body contains it.

    Attributes:
        code: the function without what changes nothing.
        methods: names that it reads off an object, which may be methods of its class.
        functions: names that it reads alone, which may be functions of its module.
    """

    code: str
    methods: frozenset[str]
    functions: frozenset[str]

    @classmethod
    def of(cls, node: ast.AST) -> Text:
        """Return the text of a function's syntax tree."""
        nodes = list(ast.walk(node))
        return cls(
            _canonical(node),
            frozenset(found.attr for found in nodes if isinstance(found, ast.Attribute)) - INTERFACE,
            frozenset(found.id for found in nodes if isinstance(found, ast.Name)),
        )


@dataclass(frozen=True)
class Source:
    """A method with all that it names.

    Attributes:
        digest: a short hash.
        names: every name that is read in it.
    """

    digest: str
    names: frozenset[str]


def closure(method: str, resolve: Callable[[str, bool, Any], tuple[Text, Any] | None]) -> Source:
    """Collect a method and what it names, directly or through another: methods of its class, functions beside them.

    ``resolve(name, whether it is a method's, where the text that names it was found)`` gives the text behind a name and
    where that was found; None for one that is not part of the body.
    """
    texts: set[tuple[str, Text]] = set()
    seen = set()
    waiting: list[tuple[str, bool, Any]] = [(method, True, None)]
    while waiting:
        name, is_method, place = waiting.pop()
        key = name, is_method or id(place)
        if key in seen or (found := resolve(name, is_method, place)) is None:
            continue
        text, place = found
        seen.add(key)
        texts.add((name, text))
        waiting += [(other, True, place) for other in text.methods]
        waiting += [(other, False, place) for other in text.functions]
    codes = "\n".join(sorted(f"{name} {text.code}" for name, text in texts))
    names = frozenset[str]().union(*(text.methods | text.functions for _, text in texts))
    return Source(hashlib.sha256(codes.encode()).hexdigest()[:16], names)


def source(cls: type, method: str) -> Source:
    """Return what a method of a class says, as that class sees it: with its own methods in place of inherited ones.

    Raises:
        OSError, TypeError: where the source is not there to read.
    """

    def resolve(name: str, is_method: bool, place: Any) -> tuple[Text, Any] | None:
        function = method_of(cls, name) if is_method else place.get(name)
        if not isinstance(function, FunctionType):
            return None
        function = inspect.unwrap(function)
        if not is_method and function.__module__ != place.get("__name__"):
            return None
        return _text(function), function.__globals__

    return closure(method, resolve)


def method_of(cls: type, name: str) -> FunctionType | None:
    """Return the function behind a method or property, unless torch or the core of transformers defines it."""
    for base in cls.__mro__:
        if name in vars(base):
            value = vars(base)[name]
            value = getattr(value, "fget", getattr(value, "__func__", value))
            return value if isinstance(value, FunctionType) and not _is_framework(base.__module__) else None
    return None


def names_of(cls: type, method: str) -> dict[str, Any]:
    """Return what the names in a method of a class stand for: upstream's functions beside it."""
    return inspect.unwrap(getattr(cls, method)).__globals__  # type: ignore[no-any-return]


def site_name(cls: type, method: str) -> str:
    """Name a site: "<model folder>.<Class>.<method>" in transformers, elsewhere with the whole name of the module."""
    module = cls.__module__
    if module.startswith("transformers.models."):
        module = module.rpartition(".")[2].removeprefix("modeling_")
    return f"{module}.{cls.__qualname__}.{method}"


def parameters(function: Callable[..., Any]) -> list[str]:
    """Return names, kinds and defaults; annotations do not matter."""
    found = inspect.signature(function).parameters.values()
    return [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in found]


def _is_framework(module: str) -> bool:
    """Tell whether models are built on this module's classes, whose methods are not part of what a model says."""
    return module.startswith(("torch.", "transformers.")) and not module.startswith("transformers.models.")


_texts: WeakKeyDictionary[FunctionType, Text] = WeakKeyDictionary()


def _text(function: FunctionType) -> Text:
    """Read a function's source, once."""
    if function not in _texts:
        lines = inspect.getsource(function)
        indented = lines[0].isspace()  # a method, around which there must be a block
        (node,) = ast.parse(f"if 1:\n{lines}" if indented else lines).body
        _texts[function] = Text.of(node.body[0] if isinstance(node, ast.If) and indented else node)
    return _texts[function]


def _canonical(node: Any) -> str:
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: getattr(node, name, None) for name in node._fields if name not in _SILENT}
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    # what a version of Python has no field for is as if it were empty
    told = (f"{name}={_canonical(value)}" for name, value in fields.items() if value is not None and value != [])
    return f"{type(node).__name__}({','.join(told)})"
