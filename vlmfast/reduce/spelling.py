"""Methods as text: what a command line, a configuration file or a request names a method by."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from typing import Any

from vlmfast.reduce.methods import CLASSES, METHODS, LayerMethod, Method, Named

OF_IMAGES = {name: method for name, method in METHODS.items() if "image" in method.takes}
NUMBER = r"(\d+|\d*\.\d+)"


def parse_method(text: str, trusted: bool = False) -> Method | LayerMethod:
    """Make a method from text.

    Args:
        text: a name with a number, or a share such as 0.1, for each argument that has no default ("visionzip:54+10",
            "fastv:2:0.5"; several numbers with commas between them are a sequence, "pyramiddrop:8,16:0.5,0.25"), or a
            call as Python shows it, with literal arguments ("DivPrune(keep=64, centered=True)").
        trusted: whether a call may name a class of any module ("my_package.methods.Farthest(keep=64)"), which is then
            imported. Text of a request must not.

    Raises:
        ValueError: for anything else, or arguments that the method does not take.
    """
    if "(" in text:
        return _from_call(text, trusted)
    name, _, budget = text.partition(":")
    arguments = re.split("[+:]", budget)
    known = name in OF_IMAGES and len(arguments) == len(OF_IMAGES[name].required())
    if not known or not all(re.fullmatch(rf"{NUMBER}(,{NUMBER})*", argument) for argument in arguments):
        raise ValueError(f"must be one of {usage()}, got {text!r}")
    return _made(METHODS[name], [_argument(argument) for argument in arguments], {})


def spell_method(method: Method | LayerMethod) -> str:
    """Return the text that `parse_method` makes the method from: the same for equal methods, in every process.

    Raises:
        TypeError: for a method that is no dataclass, so that its arguments are not known, or that is defined in a
            function or in a script, which other processes do not find.
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


def usage() -> str:
    """Say what `parse_method` takes."""
    forms = [f"{name}:{'+'.join(method.required()).upper()}" for name, method in sorted(OF_IMAGES.items())]
    numbers = (
        "each a number of tokens such as 64 or a share such as 0.1; layers are numbers, with commas between several"
    )
    return f"{', '.join(forms)}, {numbers}"


def _argument(text: str) -> Any:
    values = [float(number) if "." in number else int(number) for number in text.split(",")]
    return values[0] if len(values) == 1 else tuple(values)


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
