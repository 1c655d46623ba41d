"""Methods as they are typed on a command line, such as ``divprune:64:centered=True`` or ``scope:0.3+fastv:8:0.5``."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlmfast.reduce.methods import METHODS, LayerMethod, Method, Named

Reducing = Method | LayerMethod | list[Method | LayerMethod]  # what `vlmfast.patch` takes as ``reduce``

NUMBER = re.compile(r"-?(\d+|\d*\.\d+|\d+\.)")
EXAMPLE = "scope:64, visionzip:54:10, divprune:0.1:centered=True, pyramiddrop:8,16:0.5,0.25 or scope:0.3+fastv:8:0.5"


def parse(text: str, kind: str = "image") -> Reducing:
    """Make a method, or several that are one behind the other, of what was typed.

    Args:
        text: the name of a method and, each behind a colon, its arguments, in their order or as ``name=value``: a
            number of tokens, a share of them such as 0.1, True or False, a word, or several numbers with commas between
            them. Between two methods there is a plus sign; between two numbers it stands for the colon, as in "54+10".
        kind: "image" or "video", what the method has to reduce.

    Raises:
        ValueError: for anything else, with the names that are known and how the method is written.
    """
    methods = [_one(part, kind) for part in re.split(r"\+(?=[A-Za-z])", text)]
    return methods[0] if len(methods) == 1 else methods


def _one(text: str, kind: str) -> Method | LayerMethod:
    name, *given = re.split(r"[:+]", text)
    if name.lower() not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(_names(kind))}; written as {EXAMPLE}")
    method: Any = METHODS[name.lower()]
    form = f"{name.lower()} is written {written(method)}"
    if kind not in method.takes:
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


def _value(text: str) -> Any:
    parts = text.split(",")
    if all(map(NUMBER.fullmatch, parts)):
        numbers = tuple(float(part) if "." in part else int(part) for part in parts)
        return numbers[0] if len(numbers) == 1 else numbers
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _names(kind: str) -> list[str]:
    return sorted(name for name, method in METHODS.items() if kind in method.takes)


def written(method: type[Named]) -> str:
    """Say how a method is typed: its name, its arguments in capitals, and in brackets those that have a default."""
    name = next(name for name, cls in METHODS.items() if cls is method)
    required = "".join(f":{argument.upper()}" for argument in method.required())
    parameters = inspect.signature(method).parameters.values()
    optional = "".join(f"[:{p.name}={p.default}]" for p in parameters if p.default is not p.empty)
    return f"{name}{required}{optional}"


def usage(kind: str = "image") -> str:
    """Say what `parse` takes."""
    forms = ", ".join(written(METHODS[name]) for name in _names(kind))
    return (
        f"{forms}: numbers of tokens such as 64, or shares such as 0.1; layers are numbers; several have commas "
        f"between them; one method behind another as in scope:0.3+fastv:8:0.5"
    )


def spell(methods: Method | LayerMethod | Sequence[Method | LayerMethod]) -> str:
    """Say how a method is typed that `parse` gives, with the arguments that are not its defaults."""
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


def at_budget(method: type[Named], keep: int | float, total: int, layer: int) -> Any:
    """Make a method that keeps so many visual tokens, or None where its arguments are none that are known here.

    Args:
        method: a class of the register.
        keep: a number of tokens, or a share of them. VisionZip merges into a sixth of it, as published (54 + 10).
        total: the number of visual tokens.
        layer: the layer at whose input a method cuts that does so between layers. Those before it see all tokens.
    """
    merged = max(1, round(keep / 6.4)) if isinstance(keep, int) else keep / 6.4
    share = keep if isinstance(keep, float) else math.ceil(1e4 * keep / total) / 1e4  # of which so many are whole
    known: dict[tuple[str, ...], tuple[Any, ...]] = {
        ("keep",): (keep,),
        ("dominant", "contextual"): (keep - merged, merged),
        ("layer", "keep"): (layer, keep),
        ("layers", "shares"): ((layer,), (share,)),
    }
    arguments = known.get(tuple(method.required()))
    return None if arguments is None else method(*arguments)


def every(kind: str, keep: int | float, total: int, layer: int, frames: int = 1) -> list[Any]:
    """Make every registered method that reduces images, or videos, at one budget, and with each switch that it has on.

    Those whose arguments `at_budget` does not know are left out.

    Args:
        kind: "image" or "video".
        keep: a number of tokens, of videos for each frame, or a share of them.
        total: the number of visual tokens.
        layer: as `at_budget`.
        frames: of a video.
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
        found += [made, *(replace(made, **{p.name: True}) for p in parameters if p.default is False)]
    return found
