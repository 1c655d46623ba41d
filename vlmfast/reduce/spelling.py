"""Methods as text, for command lines, configurations and requests: ``divprune:64:centered=True``, or a call."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import math
import re
from collections.abc import Sequence
from typing import Any

from vlmfast.reduce.methods import CLASSES, METHODS, LayerMethod, Method, Named

Reducing = Method | LayerMethod | list[Method | LayerMethod]  # the argument ``reduce`` of `vlmfast.patch`

NUMBER = re.compile(r"-?(\d+|\d*\.\d+|\d+\.)")
EXAMPLE = "scope:64, visionzip:54:10, divprune:0.1:centered=True, pyramiddrop:8,16:0.5,0.25 or scope:0.3+fastv:8:0.5"


def parse(text: str, kind: str | None = "image", trusted: bool = False) -> Reducing:
    """Make a method, or several methods in sequence, from text.

    Args:
        text: the name of a method and, each behind a colon, its arguments, in their order or as ``name=value``: a
            number of tokens, a share of them such as 0.1, True or False, a word, or several numbers with commas between
            them. Between two methods there is a plus sign; between two numbers it stands for the colon, as in "54+10".
            Or a call as Python shows it, with literal arguments: "DivPrune(keep=64, centered=True)".
        kind: "image" or "video", what the method has to reduce, or None for either.
        trusted: whether a call may name a class of any module ("my_package.methods.Farthest(keep=64)"), which is then
            imported. The text of a request must not.

    Raises:
        ValueError: for anything else, with the names that are known and how the method is written.
    """
    if "(" in text:
        return _from_call(text, trusted)
    methods = [_one(part, kind) for part in re.split(r"\+(?=[A-Za-z])", text)]
    return methods[0] if len(methods) == 1 else methods


def spelled(reduce: Any) -> Any:
    """Return the methods that ``reduce`` names if it is text, and anything else as it is."""
    return parse(reduce, kind=None) if isinstance(reduce, str) else reduce


def _one(text: str, kind: str | None) -> Method | LayerMethod:
    name, *given = re.split(r"[:+]", text)
    if name.lower() not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(_names(kind))}; written as {EXAMPLE}")
    method: Any = METHODS[name.lower()]
    form = f"{name.lower()} is written {written(method)}"
    if kind is not None and kind not in method.takes:
        taken = " and ".join(f"{other}s" for other in method.takes)
        raise ValueError(f"{name.lower()} reduces {taken}, not {kind}s; known: {', '.join(_names(kind))}")
    signature = inspect.signature(method)
    places, named = [], {}
    for argument in given:
        key, equals, value = argument.rpartition("=")
        if not value or (equals and key not in signature.parameters):
            raise ValueError(f"{form}, got {text!r}")
        if equals:
            named[key] = _value(value)
        else:
            places.append(_value(value))
    try:
        if len(places) > len(method.required()):
            raise TypeError("too many arguments; those in brackets are given as name=value")
        signature.bind(*places, **named)
    except TypeError as error:
        raise ValueError(f"{form}: {error}, got {text!r}") from error
    try:
        found: Method | LayerMethod = method(*places, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{form}: {error}") from error
    return found


def _from_call(text: str, trusted: bool) -> Method | LayerMethod:
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("this is no call")
        arguments = [ast.literal_eval(argument) for argument in call.args]
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f'must be a method with literal arguments, such as "DivPrune(keep=64, centered=True)", got {text!r}'
        ) from error
    return _made(_class(ast.unparse(call.func), trusted), arguments, keywords)


def _class(name: str, trusted: bool) -> type[Named]:
    module, _, last = name.rpartition(".")
    if not module and last in CLASSES:
        return CLASSES[last]
    if not module or not trusted:
        raise ValueError(f"must name one of {', '.join(CLASSES)}, got {name}")
    try:
        found = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no method {name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Named)):
        raise ValueError(f"{name} is no method")
    return found


def _made(cls: Any, arguments: list[Any], keywords: dict[str, Any]) -> Method | LayerMethod:
    try:
        found: Method | LayerMethod = cls(*arguments, **keywords)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return found


def _value(text: str) -> Any:
    parts = text.split(",")
    if all(map(NUMBER.fullmatch, parts)):
        numbers = tuple(float(part) if "." in part else int(part) for part in parts)
        return numbers[0] if len(numbers) == 1 else numbers
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _names(kind: str | None) -> list[str]:
    return sorted(name for name, method in METHODS.items() if kind is None or kind in method.takes)


def written(method: type[Named]) -> str:
    """Return the form of a method in text: its name, arguments in capitals, and those with a default in brackets."""
    name = next(name for name, cls in METHODS.items() if cls is method)
    required = "".join(f":{argument.upper()}" for argument in method.required())
    parameters = inspect.signature(method).parameters.values()
    optional = "".join(f"[:{p.name}={p.default}]" for p in parameters if p.default is not p.empty)
    return f"{name}{required}{optional}"


def usage(kind: str = "image") -> str:
    """Describe the text that `parse` takes."""
    forms = ", ".join(written(METHODS[name]) for name in _names(kind))
    return (
        f"{forms}: numbers of tokens such as 64, or shares such as 0.1; layers are numbers; several have commas "
        f"between them; one method behind another as in scope:0.3+fastv:8:0.5"
    )


def spell(methods: Method | LayerMethod | Sequence[Method | LayerMethod]) -> str:
    """Return the text from which `parse` makes the method, with the arguments that are not defaults."""
    if not isinstance(methods, (Method, LayerMethod)):
        return "+".join(map(spell, methods))
    name = next((name for name, cls in METHODS.items() if cls is type(methods)), type(methods).__name__)
    parts = [name]
    for argument, parameter in inspect.signature(type(methods)).parameters.items():
        value = getattr(methods, argument)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if parameter.default is parameter.empty:
            parts.append(shown)
        elif value != parameter.default:
            parts.append(f"{argument}={shown}")
    return ":".join(parts)


def spell_call(method: Method | LayerMethod) -> str:
    """Return the call that `parse` makes the method from: the same for equal methods, in every process.

    Raises:
        TypeError: for a method that is not a dataclass, so that its arguments are unknown, or that is defined in a
            function or a script, which other processes cannot import.
    """
    cls = type(method)
    if not dataclasses.is_dataclass(method):
        raise TypeError(f"a method must be a dataclass to be written as text, got {cls.__name__}")
    own = cls.__name__ not in CLASSES or CLASSES[cls.__name__] is not cls
    if own and (cls.__module__ == "__main__" or "." in cls.__qualname__):
        raise TypeError(
            f"a method must be defined in a module that can be imported, got {cls.__module__}.{cls.__qualname__}"
        )
    values = ((field.name, getattr(method, field.name)) for field in dataclasses.fields(method) if field.init)
    arguments = ", ".join(f"{name}={value!r}" for name, value in values)
    return f"{cls.__module__ + '.' if own else ''}{cls.__name__}({arguments})"


def at_budget(method: type[Named], keep: int | float, total: int, layer: int) -> Any:
    """Make a method that keeps ``keep`` visual tokens, or return None for a class with unknown arguments.

    Args:
        method: a class of the register.
        keep: a number of tokens, or a share of them. VisionZip merges into a sixth of it, as published (54 + 10).
        total: the number of visual tokens.
        layer: the layer at whose input a `LayerMethod` cuts. Layers before it see all tokens.
    """
    merged = max(1, round(keep / 6.4)) if isinstance(keep, int) else keep / 6.4
    share = keep if isinstance(keep, float) else math.ceil(1e4 * keep / total) / 1e4  # of which so many are whole
    known: dict[tuple[str, ...], tuple[Any, ...]] = {
        ("keep",): (keep,),
        ("dominant", "contextual"): (keep - merged, merged),
        ("layer", "keep"): (layer, keep),
        ("layers", "shares"): ((layer,), (share,)),
    }
    if issubclass(method, LayerMethod) and method.required() == ["keep"]:
        cut: Any = method
        return cut(keep, layers=(layer,))
    arguments = known.get(tuple(method.required()))
    return None if arguments is None else method(*arguments)


def every(kind: str, keep: int | float, total: int, layer: int, frames: int = 1) -> list[Any]:
    """Make every registered method that reduces images, or videos, at one budget, also with each of its switches on.

    Methods whose arguments `at_budget` does not know are left out.

    Args:
        kind: "image" or "video".
        keep: a number of tokens, for videos per frame, or a share of them.
        total: the number of visual tokens.
        layer: as `at_budget`.
        frames: the number of frames of a video.
    """
    found = []
    for method in METHODS.values():
        if kind not in method.takes:
            continue
        whole = issubclass(method, LayerMethod) and isinstance(keep, int)
        made = at_budget(method, keep * frames if whole else keep, total, layer)
        if made is None:
            continue
        parameters = inspect.signature(method).parameters.values()
        found += [made, *(dataclasses.replace(made, **{p.name: True}) for p in parameters if p.default is False)]
    return found
