"""Replace methods of a module by giving it another class: a subclass of its own, with the same name.

That keeps ``isinstance``, code that compares class names, hooks, ``state_dict`` and gradient checkpointing. A method
assigned to the instance would turn gradient checkpointing off (transformers 5.23 wraps ``forward`` in the class), and
in a copy of the model it would still call the original instance.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from vlmfast.modules import DIRECT, made_around
from vlmfast.patches import attention, layers, mlp, rms_norm
from vlmfast.patches.residual import FOLLOWING
from vlmfast.torch_internals import is_compiling

# Modules of replacements that torch.compile does not see: Inductor fuses upstream's own lines, which have fewer guards,
# and only upstream's lookup of the attention function can be traced. Norms, which are not wrapped, do the same.
_COMPILED_AS_UPSTREAM = (attention.__name__, layers.__name__, mlp.__name__)


class PatchedType(type):
    """Metaclass of every class that a patch swaps in: calling such a class makes an object that is not patched."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an object of the original class, for ``type(model)(config)`` and ``type(model).from_pretrained(path)``.

        Raises:
            TypeError: for a class that is derived from a swapped-in class.
        """
        original = cls.original_class  # type: ignore[attr-defined]
        if not is_swapped(cls):
            raise TypeError(
                f"{cls.__name__} must be derived from {original.__module__}.{original.__qualname__}, got one derived "
                "from the class of a patched module: derive it before the patch"
            )
        return original(*args, **kwargs)


class PatchedModule:
    """First base of every swapped-in class; the second is the module's own class."""

    original_class: ClassVar[type]
    replacements: ClassVar[Mapping[str, Callable[..., Any]]]  # name of a method -> its replacement

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as the original class, so that a saved model loads where vlmfast is not installed."""
        # Protocol 2 and later write copyreg.__newobj__, which pickle accepts only with the object's own class.
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
        """Copy by ``__getstate__`` and ``__setstate__``: the state leaves out what was compiled for the original."""
        twin: Any = object.__new__(type(self))
        # Not self.__getstate__(): that of torch's parametrised classes, which lie on top of this one, raises an error.
        state = super().__getstate__()  # type: ignore[misc]
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
    """Tell whether a patch swapped in this very class, rather than a base of it."""
    return "original_class" in vars(cls)


def patched_class(cls: type, methods: Mapping[str, Any]) -> type:
    """Make a subclass of ``cls`` with its name, module and docstring, and with these methods and properties."""
    passing = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    itself: list[type] = []
    replacing = {
        name: method if isinstance(method, property) else _while_patched(itself, cls, name, method)
        for name, method in methods.items()
    }
    # Members go in as the class is created, when transformers wraps ``forward`` for gradient checkpointing.
    members = {**passing, **replacing, "original_class": cls}
    made: Any = _type_over(type(cls))(cls.__name__, (PatchedModule, cls), members)
    made.replacements = {name: vars(made)[name] for name, method in methods.items() if not isinstance(method, property)}
    itself.append(made)
    return made  # type: ignore[no-any-return]


@functools.cache
def _type_over(kind: type) -> type:
    return PatchedType if kind is type else type(PatchedType.__name__, (PatchedType, kind), {})


def _while_patched(itself: list[type], cls: type, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a replacement that stops acting when its patch is undone, even if a caller captured the bound method.

    Callers that keep ``model.forward`` are partials, wrappers and compilers. Once the module is no longer an instance
    of the class in ``itself`` (a list, filled after the class is made), the method of its present class runs. Norms do
    not check, because that would make a norm of one row 5 to 20% slower: a captured forward of a norm keeps calling the
    op, with the weights of its module. Where torch.compile traces, the method of ``cls``, the original class, may run.
    """
    if function.__module__ == rms_norm.__name__:
        return function

    as_upstream = function.__module__ in _COMPILED_AS_UPSTREAM

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if as_upstream and is_compiling():
            return getattr(cls, name)(self, *args, **kwargs)
        if isinstance(self, itself[0]):
            return function(self, *args, **kwargs)
        return getattr(type(self), name)(self, *args, **kwargs)

    # accelerate unwraps to the innermost `__wrapped__`, and would remove this method together with its own wrappers.
    method.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    del method.__wrapped__  # type: ignore[attr-defined]
    setattr(method, DIRECT, (method, function))
    return method


def set_class(module: nn.Module, cls: type) -> None:
    """Assign the class, and rebuild the wrappers of its methods that accelerate keeps on the instance."""
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
    """Reset torch.compile, because torch 2.10 does not notice that a module changed its class."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
