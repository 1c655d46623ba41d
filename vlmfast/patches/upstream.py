"""Compute the digest of a method's body: its code and that of the methods and functions that it names.

Two methods have the same digest if they differ at most in comments, docstrings, annotations and layout; the names of
their classes do not count. A digest is the same under every supported Python; ``ast.dump`` would not be.
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

# Methods that replacements call just as the replaced bodies do, so that their code is not part of the body.
INTERFACE = {"get_input_embeddings"}
# Fields of the syntax tree that do not change what the code does.
_SILENT = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}


@dataclass(frozen=True)
class Text:
    """One function of a body.

    Attributes:
        code: its canonical syntax tree, without what does not change what the code does.
        methods: names that it reads as attributes, some of which may be methods of its class.
        functions: names that it reads as variables, some of which may be functions of its module.
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
    """The body of a method.

    Attributes:
        digest: the first 16 hexadecimal digits of its SHA-256.
        names: every name that is read in it.
    """

    digest: str
    names: frozenset[str]


def closure(method: str, resolve: Callable[[str, bool, Any], tuple[Text, Any] | None]) -> Source:
    """Collect a method and, transitively, the methods of its class and the functions of its module that it names.

    Args:
        method: the name of the method.
        resolve: called with a name, whether it is a method's, and the module of the text that names it. Returns the
            text behind the name and the module that defines it; None for a name that is not part of the body.
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
    """Return the body of a method as this class sees it: names resolve to its own methods before inherited ones.

    Raises:
        OSError, TypeError: if the source cannot be read.
    """

    def resolve(name: str, is_method: bool, place: Any) -> tuple[Text, Any] | None:
        function = method_of(cls, name) if is_method else function_behind(place.get(name))
        if not isinstance(function, FunctionType):
            return None
        function = inspect.unwrap(function)
        if not is_method and function.__module__ != place.get("__name__"):
            return None
        return _text(function), function.__globals__

    return closure(method, resolve)


def function_source(function: FunctionType) -> Source:
    """Return the body of a function, with those functions of its module that it names.

    Raises:
        OSError, TypeError: if the source cannot be read.
    """

    def resolve(name: str, is_method: bool, place: Any) -> tuple[Text, Any] | None:
        found = function if place is None else None if is_method else place.get(name)
        if not isinstance(found, FunctionType) or found.__module__ != function.__module__:
            return None
        return _text(found), found.__globals__

    return closure(function.__name__, resolve)


def method_of(cls: type, name: str) -> FunctionType | None:
    """Return the function behind a method or property, unless torch or the core of transformers defines it."""
    for base in cls.__mro__:
        if name in vars(base):
            value = vars(base)[name]
            value = getattr(value, "fget", getattr(value, "__func__", value))
            # FSDP2's subclass of a layer is the layer's, though torch makes it: transformers wraps its forward.
            framework = all(_is_framework(cls.__module__) for cls in base.__mro__[:-1])
            return value if isinstance(value, FunctionType) and not framework else None
    return None


def function_behind(value: Any) -> Any:
    """Return the function that Hugging Face `kernels`, where it is installed, made a module of; other values as given.

    Its ``use_kernel_forward_from_hub`` does so to ``apply_rotary_pos_emb``. A module whose forward it has replaced is
    returned as well, because that function does not run. Layers of `vlmfast.hub` do not count: they compute the same.
    """
    cls = type(value)
    if not hasattr(cls, "kernel_layer_name"):
        return value
    runs = getattr(vars(value).get("forward"), "__func__", cls.forward)
    if runs is not cls.forward and runs.__module__ != "vlmfast.hub":
        return value
    return inspect.getclosurevars(cls.forward).nonlocals.get("func", value)


def names_of(cls: type, method: str) -> dict[str, Any]:
    """Return the globals of a method of a class, such as upstream's helper functions in the same module."""
    return inspect.unwrap(getattr(cls, method)).__globals__  # type: ignore[no-any-return]


def site_name(cls: type, method: str) -> str:
    """Return a site's name: "<model folder>.<Class>.<method>" in transformers, elsewhere with the full module name.

    A class that torch derives, such as FSDP2's of a sharded layer, has the names of the class that it derives it from.
    """
    cls = next((base for base in cls.__mro__[:-1] if not _is_framework(base.__module__)), cls)
    module = cls.__module__
    if module.startswith("transformers.models."):
        module = module.rpartition(".")[2].removeprefix("modeling_")
    return f"{module}.{cls.__qualname__}.{method}"


def parameters(function: Callable[..., Any]) -> list[str]:
    """Return the parameters of a function as text: names, kinds and defaults, without annotations."""
    found = inspect.signature(function).parameters.values()
    return [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in found]


def _is_framework(module: str) -> bool:
    """Tell whether a module belongs to torch or the core of transformers, whose methods are not part of a body."""
    return module.startswith(("torch.", "transformers.")) and not module.startswith("transformers.models.")


_texts: WeakKeyDictionary[FunctionType, Text] = WeakKeyDictionary()


def _text(function: FunctionType) -> Text:
    """Return the text of a function; its source is parsed only once."""
    if function not in _texts:
        lines = inspect.getsource(function)
        indented = lines[0].isspace()  # a method's source parses only inside a block
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
    # An empty field counts as a missing one, since Python versions differ in the fields that they have.
    told = (f"{name}={_canonical(value)}" for name, value in fields.items() if value is not None and value != [])
    return f"{type(node).__name__}({','.join(told)})"
