"""What transformers has at a site, and whether its body is one that the replacements were written for."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

LOCK_FILE = Path(__file__).with_name("lock.json")


@dataclass(frozen=True)
class Site:
    """One method of one class of transformers, written "<model folder>.<Class>.<method>"."""

    folder: str
    class_name: str
    method: str

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site of that name."""
        return cls(*text.split("."))

    def __str__(self) -> str:
        return f"{self.folder}.{self.class_name}.{self.method}"

    @property
    def module(self) -> str:
        """The module that defines the class."""
        return f"transformers.models.{self.folder}.modeling_{self.folder}"

    def names(self, cls: type) -> bool:
        """Whether this is a site of ``cls``."""
        return cls.__module__ == self.module and cls.__qualname__ == self.class_name

    def find(self) -> type | None:
        """The class in the installed transformers, or None where it has none with that method."""
        try:
            cls = getattr(importlib.import_module(self.module), self.class_name, None)
        except ModuleNotFoundError as error:
            if error.name is not None and self.module.startswith(error.name):
                return None
            raise
        return cls if cls is not None and self.names(cls) and hasattr(cls, self.method) else None


def source(cls: type, method: str) -> str:
    """The text of a method, and of what it names, directly or through another: methods of the same class, and
    functions of the same module.

    The text, because an ``ast.dump`` differs between versions of Python.

    Raises:
        OSError: where the source is not there to read.
    """
    methods = {
        name for name, value in vars(cls).items() if isinstance(value, (FunctionType, staticmethod, classmethod))
    }
    beside = {
        name: value
        for name, value in vars(sys.modules[cls.__module__]).items()
        if isinstance(value, FunctionType) and value.__module__ == cls.__module__
    }
    texts: dict[str, str] = {}
    waiting = [method]
    while waiting:
        name = waiting.pop()
        function = inspect.unwrap(getattr(cls, name) if name in methods or name == method else beside[name])
        lines = textwrap.dedent(inspect.getsource(function)).splitlines()
        texts[name] = "\n".join(line.rstrip() for line in lines).strip()
        named = [other for other in function.__code__.co_names if other in methods or other in beside]
        waiting += [other for other in named if other not in texts]
    return "\n".join(texts[name] for name in sorted(texts))


def digest(cls: type, method: str) -> str:
    """A short hash of `source`."""
    return hashlib.sha256(source(cls, method).encode()).hexdigest()[:16]


@functools.cache
def lock() -> dict[str, dict[str, list[str]]]:
    """The bodies that the replacements were written for: site -> hash -> versions of transformers that have it."""
    known: dict[str, dict[str, list[str]]] = json.loads(LOCK_FILE.read_text())
    return known


def mismatch(site: Site, cls: type, function: Callable[..., Any]) -> str | None:
    """Why ``function`` must not replace the method of ``cls`` at the site, or None."""
    expected, got = parameters(function), parameters(getattr(cls, site.method))
    if expected != got:
        return f"its parameters are ({', '.join(got)}), expected ({', '.join(expected)})"
    try:
        body = digest(cls, site.method)
    except (OSError, TypeError) as error:
        return f"its source cannot be read ({error})"
    if body not in lock().get(str(site), {}):
        return f"its body is not one that this version of vlmfast was written for (hash {body})"
    return None


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names, kinds and defaults; annotations do not matter."""
    found = inspect.signature(function).parameters.values()
    return [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in found]
