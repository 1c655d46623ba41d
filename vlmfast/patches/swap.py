"""A module gets other methods by getting another class.

A subclass of the same name keeps ``isinstance``, what goes by the name of the class, hooks, ``state_dict`` and gradient
checkpointing. A method assigned to the instance would turn the last one off (transformers 5.23 wraps ``forward`` in the
class) and would still call the first model from a copy.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from vlmfast.modules import made_around
from vlmfast.patches import rms_norm
from vlmfast.patches.residual import FOLLOWING


class PatchedType(type):
    """The class of every class that is swapped in. What calling one makes is not patched."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an object of the original class: ``type(model)(config)``, ``type(model).from_pretrained(path)``.

        Raises:
            TypeError: for a class that was derived from one that is swapped in.
        """
        original = cls.original_class  # type: ignore[attr-defined]
        if not is_swapped(cls):
            raise TypeError(
                f"{cls.__name__} must be derived from {original.__module__}.{original.__qualname__}, got one derived "
                "from the class of a patched module: derive it before the patch"
            )
        return original(*args, **kwargs)


class PatchedModule:
    """First base of every class that is swapped in; the second is the module's own class."""

    original_class: ClassVar[type]
    replacements: ClassVar[Mapping[str, Callable[..., Any]]]  # method -> what is not that of the original class

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as the original class, so that a saved model loads where vlmfast is not installed."""
        # what later protocols write, copyreg.__newobj__, refuses every class but the object's own
        rebuild, arguments, *state = tuple(super().__reduce_ex__(1))
        cls = type(self)
        own = self.original_class if is_swapped(cls) else cls
        rebuild, *arguments = (own if item is cls else item for item in (rebuild, *arguments))
        state = [
            {k: v for k, v in part.items() if k != FOLLOWING} if isinstance(part, dict) else part for part in state
        ]
        return rebuild, tuple(arguments), *state

    def __copy__(self) -> Any:
        """Copy the patched module as patched."""
        return self._as_patched(getattr(super(), "__copy__", None) or self._rebuilt)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the patched module as patched."""
        return self._as_patched(getattr(super(), "__deepcopy__", None) or self._rebuilt, memo)

    def _rebuilt(self, memo: dict[int, Any] | None = None) -> Any:
        """Copy by the state that the class gives, which leaves out what is compiled for the original."""
        twin: Any = object.__new__(type(self))
        state = super().__getstate__()  # type: ignore[misc] # not that of a class on top: torch's parametrised ones refuse
        if memo is not None:
            memo[id(self)] = twin
            state = copy.deepcopy(state, memo)
        twin.__setstate__(state)
        return twin

    def _as_patched(self, copied: Callable[..., Any], *memo: dict[int, Any]) -> Any:
        twin = copied(*memo)
        twin.__class__ = type(self)
        return twin


def is_swapped(cls: type) -> bool:
    """Tell whether a class is one that a patch swaps in; others may be derived from it."""
    return "original_class" in vars(cls)


def patched_class(cls: type, methods: Mapping[str, Any]) -> type:
    """Make a subclass of ``cls`` that passes for it, with these methods and properties."""
    passing = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    itself: list[type] = []
    replacing = {
        name: method if isinstance(method, property) else _while_patched(itself, name, method)
        for name, method in methods.items()
    }
    # in the class as it is made: what transformers wraps for gradient checkpointing is what it finds then
    members = {**passing, **replacing, "original_class": cls}
    made: Any = _type_over(type(cls))(cls.__name__, (PatchedModule, cls), members)
    made.replacements = {name: vars(made)[name] for name, method in methods.items() if not isinstance(method, property)}
    itself.append(made)
    return made  # type: ignore[no-any-return]


@functools.cache
def _type_over(kind: type) -> type:
    return PatchedType if kind is type else type(PatchedType.__name__, (PatchedType, kind), {})


def _while_patched(itself: list[type], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Have a method that somebody keeps (``model.forward`` in a partial, a wrapper, a compiler) end with its patch.

    On a module that is no longer of the class in ``itself``, made after its methods, it runs what the class of the
    module has by then. The methods of norms do not ask, which would make a norm of one row 5 to 20% slower: one that is
    kept goes on calling the op, with the weights of its module.
    """
    if function.__module__ == rms_norm.__name__:
        return function

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, itself[0]):
            return function(self, *args, **kwargs)
        return getattr(type(self), name)(self, *args, **kwargs)

    # accelerate takes its wrappers off by going on to the last `__wrapped__`, and would take this method off as well
    method.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    del method.__wrapped__  # type: ignore[attr-defined]
    return method


def set_class(module: nn.Module, cls: type) -> None:
    """Assign the class, and make anew what accelerate keeps on the instance around a method of the old one."""
    old = type(module)
    module.__class__ = cls
    stored = vars(module)
    stored.pop(FOLLOWING, None)
    for name in {*vars(cls).get("replacements", ()), *vars(old).get("replacements", ())}:
        for key in (name, f"_old_{name}", f"_original_{name}"):
            anew = made_around(stored.get(key), getattr(old, name), getattr(cls, name))
            if anew is not None:
                stored[key] = anew


def trace_anew() -> None:
    """Have torch.compile trace again what it has traced: torch 2.10 does not notice that a module changed its class."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
