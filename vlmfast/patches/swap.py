"""A module gets other methods by getting another class.

A subclass of the same name keeps ``isinstance``, what goes by the name of the class, hooks, ``state_dict`` and gradient
checkpointing. A method assigned to the instance would turn the last one off (transformers 5.23 wraps ``forward`` in the
class) and would still call the first model from a copy.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, ClassVar

from torch import nn


class PatchedModule:
    """First base of every class that is swapped in; the second is the module's own class."""

    original_class: ClassVar[type]
    replacements: ClassVar[Mapping[str, Callable[..., Any]]]  # method -> what is not that of the original class

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as the original class, so that a saved model loads where vlmfast is not installed."""
        # what later protocols write, copyreg.__newobj__, refuses every class but the object's own
        rebuild, arguments, *state = tuple(super().__reduce_ex__(1))
        return rebuild, tuple(self.original_class if item is type(self) else item for item in arguments), *state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the patched module as patched; the default would build the copy from `__reduce_ex__`."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(vars(self), memo))  # type: ignore[attr-defined]
        return twin


def patched_class(cls: type, methods: Mapping[str, Callable[..., Any]]) -> type:
    """Make a subclass of ``cls`` that passes for it, with these methods."""
    passing = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    record = {"original_class": cls, "replacements": methods}
    return type(cls.__name__, (PatchedModule, cls), {**passing, **record, **methods})


def set_class(module: nn.Module, cls: type) -> None:
    """Assign the class, and bind anew the methods of the old one that accelerate's hooks keep on the instance."""
    old = type(module)
    module.__class__ = cls
    stored = vars(module)
    for name in {*vars(cls).get("replacements", ()), *vars(old).get("replacements", ())}:
        for key in (name, f"_old_{name}"):
            if getattr(stored.get(key), "__func__", None) is getattr(old, name):
                stored[key] = MethodType(getattr(cls, name), module)


def trace_anew() -> None:
    """Have torch.compile trace again what it has traced: torch 2.10 does not notice that a module changed its class."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
